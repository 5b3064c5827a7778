"""A chat remembers, forgets and obeys; what it prints is what the model says."""

import io
import os
import pty
import subprocess
import sys

import asking_helpers
import pytest

from jaxtune import chat


class Parrot:
    """Answers with how many messages it saw and the last one; remembers all that it was asked."""

    def __init__(self):
        self.seen = []

    def __call__(self, messages, turn):
        self.seen.append([(m["role"], m["content"]) for m in messages])
        yield f"{len(messages)}:"
        yield messages[-1]["content"]


def session(longest=100, system=None):
    parrot = Parrot()
    return parrot, chat.Session(parrot, fits=lambda messages: len(messages) <= longest, system=system)


def test_a_conversation_is_remembered_until_it_is_reset(capsys):
    parrot, talk = session(system="S")
    chat.talk(talk, ["hi\n", "\n", "again\n", "/reset\n", "new\n", "/system T\n", "last\n", "/quit\n", "never\n"])
    assert parrot.seen[1] == [("system", "S"), ("user", "hi"), ("assistant", "2:hi"), ("user", "again")]
    assert parrot.seen[2] == [("system", "S"), ("user", "new")]
    assert parrot.seen[3] == [("system", "T"), ("user", "last")]
    assert len(parrot.seen) == 4
    assert capsys.readouterr().out == "2:hi\n4:again\n2:new\n2:last\n"


def test_the_oldest_turns_make_room(capsys):
    parrot, talk = session(longest=4, system="S")
    chat.talk(talk, ["a", "b", "c"])
    assert parrot.seen[2] == [("system", "S"), ("user", "b"), ("assistant", "4:b"), ("user", "c")]
    assert "oldest turns no longer fit" in capsys.readouterr().err


def test_an_answer_cut_short_is_remembered_as_far_as_it_went(capsys):
    def slow(messages, turn):
        yield "so far"
        raise KeyboardInterrupt

    talk = chat.Session(slow, fits=lambda messages: True)
    chat.talk(talk, ["tell"])
    assert talk.messages[-1] == {"role": "assistant", "content": "so far"}
    assert capsys.readouterr().out == "so far\n"


def test_a_refused_message_is_told_and_forgotten(capsys):
    def refuse(messages, turn):
        raise ValueError("found 900 tokens")
        yield

    talk = chat.Session(refuse, fits=lambda messages: True)
    chat.talk(talk, ["long", "/unknown"])
    assert talk.messages == []
    told = capsys.readouterr().err
    assert "error: found 900 tokens" in told and "/unknown, which is no command" in told and "/reset" in told


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return asking_helpers.folder(tmp_path_factory.mktemp("model") / "llama")


def test_lines_of_a_pipe_are_answered_in_one_conversation(folder, monkeypatch, capsys):
    flags = [folder, "--temperature", "0", "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the rain\nin Spain\n"))
    assert chat.main(flags) == 0
    printed = capsys.readouterr().out
    model = asking_helpers.answerer(folder)
    talk = [{"role": "user", "content": "the rain"}]
    first = "".join(model.stream(talk, chat.asking.Sampling(8)))
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "in Spain"}]
    assert printed == f"{first}\n{''.join(model.stream(talk, chat.asking.Sampling(8)))}\n"


def test_a_folder_that_is_nothing_is_an_error_without_a_traceback(tmp_path, capsys):
    assert chat.main([str(tmp_path / "gone")]) == 1
    assert "gone: no such folder" in capsys.readouterr().err


def test_a_terminal_gets_a_prompt_and_may_end_it(tmp_path):
    lines = "from jaxtune import chat\nfor line in chat.typed_lines(): print('got', line, flush=True)"
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", lines], stdin=follower, stdout=subprocess.PIPE, text=True)
    os.write(leader, "é\n\x04".encode())
    out, _ = process.communicate(timeout=20)
    assert out.startswith("> got é\n> ") and process.returncode == 0
