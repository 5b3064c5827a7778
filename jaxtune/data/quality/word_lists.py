"""The lists and patterns that scores go by, in one place; English, short, and no more than they look."""

VAGUE = ("something", "anything", "somehow", "kind of", "sort of")

# Words that say nothing of what a text is about: an answer is not asked to repeat them.
_COMMON = """
    a about above after again against all also am an and any are as at be because been before being below between both
    but by can can't cannot could did do does doing don't down during each few for from further had has have having he
    her here hers him himself his how i i'm if in into is isn't it it's its itself just let let's may me might more most
    must my no nor not now of off on once only or other our ours out over own please s same shall she should so some
    such t than that that's the their theirs them then there these they this those through to too under until up upon us
    very was we were what what's when where which while who whom whose why will with within without would yes you your
    yours
"""
# An instruction's own words for what is to be done, which its answer does not repeat either.
_TO_BE_DONE = """
    answer answers ask choose classify come compose consider convert create define describe design determine discuss
    draft edit explain find following format generate give given identify include input instruction list make name
    output outline produce provide question questions read rephrase replace respond response rewrite select sentence
    sentences show state suggest summarize tell text think translate use using word words write
"""
STOP_WORDS = frozenset((_COMMON + _TO_BE_DONE).split())

# A crude list: harmless texts hold these words too (history, news, medicine, advice on safety), and harmful texts can
# do without them. No insults: those that are one everywhere are few, and `quality.drop` takes anyone's own list.
_HARMFUL = """
    anthrax assassinate behead bestiality bioweapon blackmail bomb bombing bombs botnet cocaine counterfeit ddos doxing
    doxxing explosive explosives extort extortion fentanyl genocide grenade heroin incest jihad keylogger kidnap
    kidnapping landmine laundering lynch lynching malware massacre meth methamphetamine molest molestation molotov
    murder murdering nazi nazis overdose paedophile paedophilia pedophile pedophilia phishing ransomware rape raping
    rapist ricin sarin spyware suicidal suicide supremacist terrorism terrorist torture torturing
"""
HARM = frozenset(_HARMFUL.split())

_AI = (
    r"(?:(?:as|being|since i'm|since i am|because i'm|because i am) an? "
    r"(?:ai\b|artificial intelligence|large language|language)[^,.]{0,40},? ?)"
)
_CANNOT = (
    r"(?:can't|cannot|can not|won't|will not|could not|couldn't|am (?:just |simply |currently )?(?:unable|not able) to|"
    r"'m (?:just |simply |currently )?(?:unable|not able) to|am not (?:allowed|permitted|programmed|capable|designed|"
    r"comfortable)|'m not (?:allowed|permitted|programmed|capable|designed|comfortable)|"
    r"(?:do not|don't) have (?:the (?:ability|capability|capacity|means)|access|enough information)|"
    r"must (?:decline|refuse)|have to decline|will have to decline|refuse to|decline to)"
)
# What an assistant cannot do; "I can't make it to your party" is an answer.
_DEED = (
    r"(?: to| of)?(?: (?:directly|actually|currently|really|possibly|ethically|in good conscience))? (?:accurately )?"
    r"(?:assist|help (?:you|with|in)|provide|fulfill?|comply|answer|respond|create|generate|write|produce|compose|"
    r"draft|draw|engage|participate|support|endorse|promote|encourage|condone|complete|perform|execute|discuss|share "
    r"(?:that|this|any|such|information|instructions)|suggest|do (?:that|this|so)|access|browse|"
    r"view|display|render|translate|summari[sz]e|continue with|proceed with|process|set up|teach|"
    r"tell you|say that|fabricate|facilitate|satisfy)\b"
)
_SORRY = (
    r"(?:(?:i'm|i am|we're|we are) (?:(?:very|so|really|truly|deeply|terribly|extremely) )?sorry|sorry|i apologi[sz]e|"
    r"(?:my )?apologies|unfortunately|regrettably)"
    r"(?: for (?:the|any) (?:confusion|inconvenience))?[,.:;!]? ?(?:but |that )?"
)
_TASK = r"(?:the|this|your|that) (?:task|request|prompt|instruction|input|question)"
# At an answer's first letter, in lower case. Each form is that of a speaker who declines, not of a text about one.
REFUSALS = (
    rf"{_SORRY}{_AI}?i ?{_CANNOT}(?:{_DEED}|[.!,]|$)",
    rf"{_SORRY}{_AI}i ?{_CANNOT}",
    rf"{_AI}i ?{_CANNOT}",
    rf"i ?{_CANNOT}{_DEED}",
    r"(?:i must|i have to|i'll have to|i respectfully) (?:decline|refuse)\b",
    rf"{_SORRY}{_TASK} [^.]{{0,120}}\b(?:cannot|can't|can not|unable|not able|not possible)\b",
    rf"{_SORRY}{_TASK} (?:involves|requires|is|does not|doesn't)\b",
    rf"{_TASK} (?:cannot be (?:completed|performed|done|fulfilled|answered)|does not meet the requirements|"
    r"is not suitable|is not possible)",
    rf"(?:it(?:'s| is) )?(?:not|im)possible (?:for me )?to (?:complete|perform|fulfil|answer) {_TASK}",
    r"you are requesting [^.]{0,60}\bcannot be\b",
    r"i (?:refuse|decline)\.?$",
)
