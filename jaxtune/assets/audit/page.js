"use strict";
// The page of an audit. Everything shown comes from the JSON in this file; texts only ever become text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const audit = data.audit;
const special = new Set(data.special);
const PAGE = 25;

// ---- small helpers

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
const count = (n) => (n === null || n === undefined ? "" : Math.round(n).toLocaleString("en"));
const share = (part, whole) => (whole ? (100 * part / whole).toFixed(1) + " %" : "");
const percent = (x) => (x === null || x === undefined ? "" : (100 * x).toFixed(1) + " %");

function table(head, rows, numeric) {
  const cell = (tag, value, i) => make(tag, { class: numeric.includes(i) ? "n" : null }, value);
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, head.map((value, i) => cell("th", value, i)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((value, i) => cell("td", value, i)))))));
}

function bars(caption, entries, note) {
  const most = Math.max(1, ...entries.map(([, value]) => value));
  return make("figure", {}, make("figcaption", {}, caption),
    entries.map(([name, value]) => make("div", { class: "bar" }, make("span", { title: name }, name),
      make("span", {}, make("i", { style: `width:${(100 * value / most).toFixed(2)}%` })), make("span", {}, count(value)))),
    note ? make("p", { class: "quiet" }, note) : null);
}

function histogram(caption, told) {
  if (!told || !told.count) return bars(caption, [], "none");
  const entries = told.histogram.map((bin) => [bin.from === bin.to ? count(bin.from) : `${count(bin.from)}–${count(bin.to)}`, bin.count]);
  const q = told.quantiles;
  return bars(caption, entries, `mean ${told.mean.toFixed(1)}, median ${count(q["0.5"])}, 90 % ≤ ${count(q["0.9"])}, 99 % ≤ ${count(q["0.99"])}, longest ${count(told.max)}`);
}

// ---- verdicts, kept in this browser until they are saved as a file

const stored = `jaxtune audit ${location.pathname} ${data.title}`;
let verdicts = {};
try { verdicts = JSON.parse(localStorage.getItem(stored) || "{}"); } catch { verdicts = {}; }

function judge(example, choice) {
  if (!example.key) return;
  if (choice === null) delete verdicts[example.key];
  else {
    verdicts[example.key] = { key: example.key, where: example.where, verdict: choice };
    if (choice === "fix" && example.corrected) verdicts[example.key].messages = example.corrected;
  }
  try { localStorage.setItem(stored, JSON.stringify(verdicts)); } catch { /* private windows keep nothing */ }
}

function saveVerdicts() {
  const told = { jaxtune_verdicts: 1, audit: data.title, verdicts: Object.values(verdicts) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(told, null, 1) + "\n"], { type: "application/json" }));
  const link = make("a", { href: url, download: "verdicts.json" });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ---- tokens

const tip = make("div", { id: "tip", hidden: true, role: "status" });
document.body.append(tip);
document.addEventListener("pointermove", (event) => {
  const box = event.target.closest ? event.target.closest(".tokens i") : null;
  tip.hidden = !box;
  if (!box) return;
  tip.textContent = box.dataset.tip;
  tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8) + "px";
});

function tokenBoxes(part) {
  const boxes = make("div", { class: "tokens", "data-side": part.side });
  const most = Math.max(1e-9, ...part.weights.map(([weight]) => weight));
  let at = 0;
  for (const [weight, length] of part.weights) {
    for (let i = 0; i < length; i++, at++) {
      const id = part.ids[at];
      const [text, piece] = data.pieces[id];
      const names = [special.has(id) ? "special" : null, weight > 0 ? "trained" : null].filter(Boolean).join(" ");
      boxes.append(make("i", {
        class: names || null, style: weight > 0 ? `--w:${(weight / most).toFixed(3)}` : null,
        "data-tip": `id ${id} · weight ${weight} · ${piece}`, "data-id": id, "data-weight": weight,
      }, text.replaceAll("\n", "↵\n") || piece));
    }
  }
  if (part.more) boxes.append(make("span", { class: "quiet" }, ` … and ${count(part.more)} more tokens`));
  return boxes;
}

function partsOf(shown) {
  return shown.parts.map((part) => [
    part.side === "sequence" ? null : make("b", { class: "quiet" }, part.side), tokenBoxes(part),
    part.text ? make("details", {}, make("summary", {}, "As text (some characters are several tokens)"), make("div", { class: "tokens", dir: "auto" }, part.text)) : null]);
}

// ---- the parts of the page

function overview() {
  const total = audit.funnel.total, packing = audit.packing;
  const card = (name, value, note) => make("div", { class: "card" }, name, make("b", {}, value), make("span", { class: "quiet" }, note || ""));
  const stages = [["read", total.rows], ["parsed", total.stages.parsed], ["valid", total.stages.valid],
    ["kept by filters", total.stages.kept], ["within the length", total.stages.fits]];
  return [
    make("h2", {}, "What is worth attention"),
    audit.findings.length ? audit.findings.map((f) => make("p", { class: `finding ${f.level}` }, make("b", {}, f.level), ": ", make("span", {}, f.text)))
      : make("p", {}, "Nothing to warn of."),
    make("h2", {}, "In all"),
    make("div", { class: "cards" },
      card("rows", count(total.rows), `${count(total.kept)} give an example`),
      card("examples", count(total.examples), packing.rows === null ? "" : `in ${count(packing.rows)} rows ${packing.epochs === null ? "an epoch" : "over the run"}`),
      card("tokens", count(total.tokens), `${share(total.trained_tokens, total.tokens)} trained`),
      card("tokens lost", count(total.tokens_lost), share(total.tokens_lost, total.tokens + total.tokens_lost)),
      card("left out on purpose", count(total.tokens_left_out), "tokens"),
      card("stop token trained", `${count(total.stops)} of ${count(total.turns)}`, "assistant turns"),
      card("packing", packing.fill === null ? "—" : packing.fill.map(percent).join(", "), `of rows of ${packing.row_length.map(count).join(" and ")}`),
      card("updates an epoch", packing.steps_per_epoch === null ? "—" : String(packing.steps_per_epoch), `${count(packing.steps)} in the run`)),
    make("h2", {}, "From rows to examples"),
    make("div", { class: "plots" }, bars("Rows that come so far", stages),
      bars("Tokens that come so far", stages.slice(1).map(([name], i) => [name, total.tokens_at_stages[["parsed", "valid", "kept", "fits"][i]]]),
        "those of rows that cannot be read are not known")),
    make("h3", {}, "By source"),
    table(["source", "rows", "parsed", "valid", "kept", "fit", "examples", "tokens", "trained", "lost"],
      audit.funnel.sources.map((s) => [sourceLink(s.name), count(s.rows), count(s.stages.parsed), count(s.stages.valid),
        count(s.stages.kept), count(s.stages.fits), count(s.examples), count(s.tokens), share(s.trained_tokens, s.tokens), count(s.tokens_lost)]),
      [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    make("h3", {}, "Why rows are lost"),
    Object.keys(total.lost).length ? table(["source", "reason", "does not reach", "rows", "tokens", "first"],
      audit.funnel.sources.flatMap((s) => Object.entries(s.lost).map(([reason, l]) =>
        [s.name, reason, l.stage, count(l.rows), count(l.tokens), make("code", {}, l.where)])), [3, 4]) : make("p", {}, "None is lost."),
    audit.mixture && audit.mixture.leaves.length > 1 ? [make("h2", {}, "Mixture: asked and realised"),
      table(["source", "examples", "asked", "realised", "epochs"], audit.mixture.leaves.map((l) =>
        [sourceLink(l.name), count(l.examples), percent(l.rate), percent(l.realised), l.epochs === null ? "" : l.epochs.toFixed(2)]), [1, 2, 3, 4])] : [],
  ].flat();
}

function sourceLink(name) {
  return make("a", { href: "#", onclick: (event) => { event.preventDefault(); filter.source = name; open("examples"); } }, name);
}

let shownSource = "";
function statistics() {
  const names = Object.keys(audit.statistics_by_source);
  const told = shownSource ? audit.statistics_by_source[shownSource] : audit.statistics;
  const entries = (counts) => Object.entries(counts || {}).filter(([, n]) => n).sort((a, b) => b[1] - a[1]);
  const q = told.quality || {};
  const pick = make("select", { "aria-label": "source", onchange: (e) => { shownSource = e.target.value; render(); } },
    make("option", { value: "" }, "all sources"), names.map((n) => make("option", { value: n, selected: n === shownSource }, n)));
  const scores = Object.entries(q).filter(([, v]) => typeof v === "number").map(([name, v]) => [name.replaceAll("_", " "), v.toFixed(3)]);
  return [
    names.length > 1 ? make("div", { class: "tools" }, pick) : null,
    make("h2", {}, "Statistics"),
    make("div", { class: "plots" },
      histogram("Instruction length, tokens", told.instruction_tokens),
      histogram("Answer length, tokens", told.response_tokens),
      bars(`Kinds of task (diversity ${told.kinds.diversity.toFixed(2)})`, entries(told.kinds.counts)),
      bars(`Kinds, coding and mathematics first (diversity ${told.better_kinds.diversity.toFixed(2)})`, entries(told.better_kinds.counts)),
      entries(told.categories).length ? bars("Categories of the data", entries(told.categories).slice(0, 20)) : null,
      entries(told.languages).length ? bars("Languages", entries(told.languages).slice(0, 15)) : null,
      bars("Turns", Object.entries(told.turns)),
      q.histogram ? bars("Quality, mean of five scores", q.histogram.map((b) => [`${b.from}–${b.to}`, b.count])) : null,
      histogram("Words of the instruction", told.difficulty.words),
      histogram("Reasoning steps in the answer", told.difficulty.steps),
      histogram("Constraints in the instruction", told.difficulty.constraints)),
    make("h3", {}, "Answers and rows"),
    table(["", "number"], [
      ["trained answers", count(told.responses.trained)], ["under 20 tokens", count(told.responses.very_short)],
      ["over 1,024 tokens", count(told.responses.very_long)], ["rows without an answer", count(told.responses.empty_rows)],
      ["questions without one at the end", count(told.responses.unanswered_questions)], ["rows that refuse", count(told.responses.refusing_rows)], ["rows that copy the instruction", count(told.responses.copying_rows)],
      ["rows that reason in steps", count(told.responses.reasoning_rows)], ["rows that repeat another", count(told.duplicate_rows)],
      ["instructions that repeat another", count(told.duplicate_instructions)]], [1]),
    scores.length ? [make("h3", {}, "Scores, means"), table(["score", "mean"], scores, [1])] : [],
    shownSource ? [] : [make("h3", {}, "Shares"), table(["", "of draws", "of trained tokens"], [
      ...Object.entries(audit.shares.draws_by_tag).map(([tag, s]) => [`tag ${tag}`, percent(s), percent(audit.shares.trained_tokens_by_tag[tag])]),
      ["rows that reason in steps (of those with an instruction)", percent(audit.shares.reasoning_rows), ""]], [1, 2])],
  ].flat();
}

const filter = { text: "", source: "", problem: "", chosen: "problems", verdict: "" };
let from = 0, here = -1, opened = new Set();
const texts = data.examples.map((e) => [e.where, e.source, e.kind, e.language, ...e.problems, e.raw || "", ...e.messages.map((m) => m.content)].join("\n").toLowerCase());

function chosen() {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
  return data.examples.map((e, i) => i).filter((i) => {
    const e = data.examples[i];
    return (!filter.source || e.source === filter.source)
      && (!filter.problem || e.problems.includes(filter.problem))
      && (filter.chosen !== "random" || e.random)
      && (filter.chosen !== "problems" || filter.problem || words.length || e.problems.length || !data.examples.some((o) => o.problems.length))
      && (!filter.verdict || (verdicts[e.key] ? verdicts[e.key].verdict : "none") === filter.verdict)
      && words.every((word) => texts[i].includes(word));
  });
}

function select(label, value, options, change) {
  return make("select", { "aria-label": label, onchange: (e) => { change(e.target.value); from = 0; here = -1; list(); } },
    options.map(([v, name]) => make("option", { value: v, selected: v === value }, name)));
}

function examples() {
  const sources = [...new Set(data.examples.map((e) => e.source))];
  const problems = [...new Set(data.examples.flatMap((e) => e.problems))];
  return [
    make("div", { class: "tools" },
      make("input", { type: "search", id: "search", placeholder: "Search texts, places, problems", "aria-label": "Search", value: filter.text,
        oninput: (e) => { filter.text = e.target.value; from = 0; here = -1; list(); } }),
      select("which", filter.chosen, [["problems", "problems first"], ["all", "all shown here"], ["random", "drawn at random"]], (v) => { filter.chosen = v; }),
      select("source", filter.source, [["", "every source"], ...sources.map((s) => [s, s])], (v) => { filter.source = v; }),
      select("problem", filter.problem, [["", "every problem"], ...problems.map((p) => [p, p])], (v) => { filter.problem = v; }),
      select("verdict", filter.verdict, [["", "any verdict"], ["none", "no verdict"], ["keep", "keep"], ["drop", "drop"], ["fix", "fix"]], (v) => { filter.verdict = v; }),
      make("button", { id: "save", onclick: saveVerdicts }, "Save verdicts")),
    make("p", { class: "quiet", id: "said", role: "status" }),
    make("div", { id: "list" }),
  ];
}

function list() {
  const found = chosen(), box = document.getElementById("list");
  if (!box) return;
  const judged = Object.keys(verdicts).length;
  document.getElementById("said").textContent = `${count(found.length)} of ${count(data.examples.length)} examples shown here; verdicts: ${count(judged)}`;
  box.replaceChildren(...found.slice(from, from + PAGE).map((i, n) => exampleBox(i, from + n === here)),
    make("div", { class: "tools" },
      from > 0 ? make("button", { onclick: () => { from = Math.max(0, from - PAGE); here = -1; list(); scrollTo(0, 0); } }, "Earlier") : null,
      from + PAGE < found.length ? make("button", { onclick: () => { from += PAGE; here = -1; list(); scrollTo(0, 0); } }, "Later") : null));
}

function exampleBox(i, isHere) {
  const e = data.examples[i], verdict = verdicts[e.key] && verdicts[e.key].verdict;
  const first = e.messages.find((m) => m.role === "user" || m.role === "text") || e.messages[0];
  const head = make("button", { "aria-expanded": opened.has(i) ? "true" : "false", onclick: () => { toggle(i); } },
    make("span", { class: "where" }, e.where),
    e.tokens ? make("span", { class: "quiet" }, `${count(e.tokens)} tokens, ${share(e.trained, e.tokens)} trained`) : null,
    e.kind ? make("span", { class: "quiet" }, e.kind) : null,
    e.problems.map((p) => make("span", { class: "badge warning" }, p)),
    verdict ? make("span", { class: `badge verdict-${verdict}` }, verdict) : null,
    make("span", { class: "text" }, first ? first.content.slice(0, 200) : (e.raw || "").slice(0, 200)));
  return make("section", { class: isHere ? "example here" : "example", "data-index": i }, head, opened.has(i) ? inside(e, i) : null);
}

function inside(e, i) {
  const choice = (name, label) => make("button", { class: `verdict-${name}`, "data-verdict": name, "aria-pressed": verdicts[e.key] && verdicts[e.key].verdict === name ? "true" : "false",
    disabled: !e.key, onclick: () => { judge(e, name); list(); } }, label);
  const q = e.quality;
  return make("div", { class: "inside" },
    make("p", { class: "quiet" }, [e.source, e.epoch ? `epoch ${e.epoch}` : null, e.language, q ? `quality ${q.mean} (${["clarity", "length_fit", "format_match", "non_refusal", "topic_relevance"].map((s) => `${s.replace("_", " ")} ${q[s]}`).join(", ")})` : null].filter(Boolean).join(" · ")),
    e.message ? make("p", { class: "finding error" }, make("span", {}, e.message)) : (e.reason ? make("p", { class: "finding warning" }, make("span", {}, `${e.reason}: does not reach “${e.stage}”`)) : null),
    e.raw ? make("pre", { class: "tokens" }, e.raw) : null,
    partsOf(e),
    e.messages.length ? make("details", {}, make("summary", {}, "As a conversation"), e.messages.map((m) => make("div", { class: "turn" }, make("b", {}, m.role), make("div", {}, m.content)))) : null,
    make("div", { class: "tools" }, choice("keep", "Keep"), choice("drop", "Drop"), choice("fix", "Fix"),
      make("button", { disabled: !verdicts[e.key], onclick: () => { judge(e, null); list(); } }, "Undo")),
    verdicts[e.key] && verdicts[e.key].verdict === "fix" ? correcting(e) : null);
}

// What a template reads beside the text (Alpaca's input) belongs to the old text; weights and calls of tools stay.
function said(message, content) {
  if (content === message.content) return message;
  return Object.fromEntries([["role", message.role], ["content", content],
    ...["weight", "tool_calls"].filter((key) => key in message).map((key) => [key, message[key]])]);
}

function correcting(e) {
  if (!e.editable) return make("p", { class: "quiet" }, "This row is worded by a template or gives several conversations: correct it in its file. Until then it is left out.");
  const now = verdicts[e.key].messages || e.messages;
  const areas = now.map((m) => make("label", { class: "turn" }, make("b", {}, m.role), make("textarea", { "data-role": m.role }, m.content)));
  const apply = () => { e.corrected = now.map((m, n) => said(m, areas[n].querySelector("textarea").value)); judge(e, "fix"); list(); };
  return make("div", { class: "correcting" }, make("p", { class: "quiet" }, verdicts[e.key].messages ? "Corrected; this text is trained on in place of the row's." : "Left out until it is corrected here."),
    areas, make("button", { "data-apply": true, onclick: apply }, "Put this in its place"));
}

function toggle(i) { if (opened.has(i)) opened.delete(i); else opened.add(i); list(); }

function rows() {
  const length = data.row_length[data.row_length.length - 1];
  return [make("h2", {}, "Packed rows of the first batch's window"),
    make("p", { class: "quiet" }, "Each segment attends to itself alone; what has a weight is coloured."),
    data.rows.map((row, r) => {
      const sizes = row.map((s) => s.parts[s.parts.length - 1].ids.length + s.parts[s.parts.length - 1].more - (s.parts.length === 1 ? 1 : 0));
      const used = sizes.reduce((a, b) => a + b, 0);
      return make("section", {}, make("h3", {}, `Row ${r + 1}: ${row.length} segments, ${count(used)} of ${count(length)} positions`),
        make("div", { class: "fills", "aria-hidden": "true" }, sizes.map((n) => make("i", { style: `width:${(100 * n / length).toFixed(3)}%` }))),
        make("div", { class: "row" }, row.map((s, n) => make("div", { class: "segment" }, make("div", { class: "quiet" }, `segment ${n + 1} · `, make("span", { class: "where" }, s.where)), partsOf(s)))));
    })];
}

function lost() {
  const listed = audit.lost_rows.slice(0, 1000);
  return [make("h2", {}, `Rows lost or cut: ${count(audit.lost_rows_in_all)}`),
    audit.lost_rows_in_all > listed.length ? make("p", { class: "quiet" }, `The first ${count(listed.length)}; audit.json has all.`) : null,
    listed.length ? table(["where", "source", "does not reach", "reason", "tokens"], listed.map((l) => [make("code", {}, l.where), l.source, l.stage, l.message || l.reason, count(l.tokens)]), [4]) : make("p", {}, "None.")];
}

function copies() {
  const pairs = (title, told) => told ? [make("h3", {}, `${title}: ${count(told.count)}`),
    told.rows.length ? table(["row", "says what this one says"], told.rows.slice(0, 500).map((p) => [make("code", {}, p.where), make("code", {}, p.of)]), []) : null] : [];
  const e = audit.evaluation;
  return [make("h2", {}, "Duplicates and contamination"), pairs("Exact duplicates", audit.duplicates.exact), pairs("Near duplicates", audit.duplicates.near),
    audit.contamination.length ? [make("h3", {}, `In a benchmark: ${count(audit.contamination.length)}`), table(["row", "benchmark", "words"], audit.contamination.slice(0, 500).map((c) => [make("code", {}, c.where), make("code", {}, c.benchmark), c.words]), [])] : [],
    e ? [make("h3", {}, "Training rows that evaluation has too"), table(["", "rows"], [["the whole row", count(e.overlap.rows.count)], ["the instruction", count(e.overlap.instructions.count)]], [1]),
      e.overlap.rows.rows.length ? make("p", {}, e.overlap.rows.rows.slice(0, 50).map((w) => [make("code", {}, w), " "])) : null] : []].flat();
}

// ---- parts, keys

const PARTS = { overview: ["Overview", overview], statistics: ["Statistics", statistics], examples: ["Examples", examples], rows: ["Packed rows", rows], lost: ["Lost rows", lost], copies: ["Duplicates", copies] };
let part = "overview";

function render() {
  tip.hidden = true;
  document.getElementById("main").replaceChildren(...PARTS[part][1]().flat(Infinity).filter(Boolean));
  document.getElementById("tabs").replaceChildren(...Object.entries(PARTS).map(([name, [title]]) =>
    make("button", { role: "tab", id: `tab-${name}`, "aria-selected": name === part ? "true" : "false", onclick: () => open(name) }, title)));
  if (part === "examples") list();
}
function open(name) { part = name; from = 0; here = -1; render(); scrollTo(0, 0); }

function step(by) {
  const found = chosen();
  if (part !== "examples" || !found.length) return;
  here = Math.max(0, Math.min(found.length - 1, here + by));
  from = Math.floor(here / PAGE) * PAGE;
  opened = new Set([found[here]]);
  list();
  document.querySelector(".example.here").scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const names = Object.keys(PARTS), found = part === "examples" ? chosen() : [];
  const example = here >= 0 ? data.examples[found[here]] : null;
  const verdict = { y: "keep", x: "drop", f: "fix", u: null };
  if (event.key >= "1" && event.key <= String(names.length)) open(names[Number(event.key) - 1]);
  else if (event.target.getAttribute("role") === "tab" && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    const next = names[(names.indexOf(part) + (event.key === "ArrowRight" ? 1 : names.length - 1)) % names.length];
    open(next);
    document.getElementById(`tab-${next}`).focus();
  } else if (event.key === "/") { event.preventDefault(); open("examples"); document.getElementById("search").focus(); }
  else if (event.key === "j") { if (part !== "examples") open("examples"); step(1); }
  else if (event.key === "k") step(-1);
  else if (event.key === "s") saveVerdicts();
  else if (example && event.key in verdict) { judge(example, verdict[event.key]); list(); }
});

render();
