"""Each question meets the answer that follows it, and nothing else."""

from jaxtune.data.quality.exchanges import Exchange, exchanges
from jaxtune.data.records import Conversation, Message


def talk(*turns):
    return Conversation(tuple(Message(role, content) for role, content in turns))


def test_a_question_has_all_that_is_answered_before_the_next():
    conversation = talk(
        ("system", "Be kind"),
        ("user", "A"),
        ("assistant", "B"),
        ("tool", "4"),
        ("assistant", "C"),
        ("user", "D"),
        ("assistant", "E"),
    )
    assert exchanges(conversation) == (Exchange("A", "", "B\n\nC"), Exchange("D", "", "E"))


def test_alpacas_fields_are_instruction_and_context():
    user = Message("user", "Sort\n\nb a", fields={"instruction": "Sort", "input": "b a"})
    (exchange,) = exchanges(Conversation((user, Message("assistant", "a b"))))
    assert exchange == ("Sort", "b a", "a b") and exchange.asked == "Sort\n\nb a"
    assert Exchange("Sort", "", "a").asked == "Sort"


def test_what_an_answer_thought_is_not_its_response():
    def answered(text):
        return exchanges(talk(("user", "A"), ("assistant", text)))[0].response

    assert answered("<think>\nlong\n</think>\n\nYes <think>b</think>or no") == "Yes or no"
    assert answered("<think>never closed") == ""
    assert answered("1 < 2") == "1 < 2"


def test_unanswered_questions_raw_text_and_answers_to_nothing_are_no_exchanges():
    assert exchanges(talk(("text", "Once"))) == ()
    assert exchanges(talk(("user", "A"))) == ()
    assert exchanges(talk(("assistant", "Welcome"), ("user", "A"), ("assistant", "B"), ("user", "C"))) == (
        Exchange("A", "", "B"),
    )


def test_an_answer_that_only_calls_tools_says_nothing():
    call = Message("assistant", "", tool_calls=({"id": "1"},))
    assert exchanges(Conversation((Message("user", "A"), call))) == (Exchange("A", "", ""),)
    then = Conversation((Message("user", "A"), call, Message("tool", "4"), Message("assistant", "It is 4")))
    assert exchanges(then) == (Exchange("A", "", "It is 4"),)


def test_users_that_speak_twice_ask_once():
    assert exchanges(talk(("user", "A"), ("user", "B"), ("assistant", "C"))) == (Exchange("A\n\nB", "", "C"),)
