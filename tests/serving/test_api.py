"""What clients of the server get, and what is refused them."""

from __future__ import annotations

import http.client
import json
import threading

import openai
import pytest

import commandv as cv
import tiny
from commandv.models.encoding import encode
from served import ASKED, chat, post, serving


@pytest.fixture(scope="module")
def lm():
    return tiny.tiny_lm(chat=True)


@pytest.fixture
def own():
    """A model for a server of the test's own: while it runs, its engine alone uses it."""
    return tiny.tiny_lm(chat=True)


@pytest.fixture(scope="module")
def known(lm):
    return {"pirate": tiny.random_adapter(lm, (1, 2)), "list": tiny.random_adapter(lm, (2,), "all", seed=3, size=0.3)}


@pytest.fixture(scope="module")
def alone(lm, known):
    """What the library says to ASKED by itself, made before a server uses the model."""
    prompt = [ASKED[0]["content"]]
    texts = {"base": cv.generate(lm, prompt, max_new_tokens=8)[0]}
    with cv.attach(lm, known["pirate"], scale=0.6), cv.attach(lm, known["list"]):
        texts["base+pirate@0.6+list"] = cv.generate(lm, prompt, max_new_tokens=8)[0]
    assert len(set(texts.values())) == 2
    return texts


@pytest.fixture(scope="module")
def served(lm, known, alone):
    with serving(lm, known) as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return served.client()


# -- what clients get ---------------------------------------------------------------


@pytest.mark.parametrize("model", ["base", "base+pirate@0.6+list"])
def test_the_models_name_picks_the_behaviour(client, alone, model, lm):
    answer = chat(client, model)
    assert answer.choices[0].message.content == alone[model]
    assert answer.model == model
    assert answer.choices[0].finish_reason == "length"
    prompt = len(encode(lm, ASKED[0]["content"]).ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        prompt,
        8,
        prompt + 8,
    )


@pytest.mark.parametrize("model", ["base", "base+pirate@0.6+list"])
def test_streams_hold_the_same_text_and_the_usage_if_wanted(client, alone, model):
    pieces = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == alone[model]
    assert len([one for one in pieces if one.choices]) > 3
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage.completion_tokens == 8
    assert all(one.usage is None for one in chat(client, model, stream=True))


def test_completions_take_texts_and_tokens(client, lm):
    text = "The quick brown fox"
    ids = list(lm.tokenizer(text).input_ids)
    answers = client.completions.create(model="base", prompt=[text, "Read the book."], max_tokens=6, temperature=0)
    same = client.completions.create(model="base", prompt=ids, max_tokens=6, temperature=0)
    assert [one.index for one in answers.choices] == [0, 1]
    assert answers.choices[0].text == same.choices[0].text != answers.choices[1].text
    assert answers.usage.prompt_tokens == len(ids) + len(lm.tokenizer("Read the book.").input_ids)
    streamed = client.completions.create(model="base", prompt=text, max_tokens=6, temperature=0, stream=True)
    assert "".join(one.choices[0].text for one in streamed) == same.choices[0].text


def test_several_answers_differ_and_come_again_with_their_seed(client):
    first, again = (
        [one.message.content for one in chat(client, n=3, temperature=1.5, seed=7).choices] for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3


def test_log_probabilities_are_those_of_the_model(client, lm):
    told = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(told) == 8
    for one in told:
        assert one.logprob == max(other.logprob for other in one.top_logprobs) <= 0
        assert len(one.top_logprobs) == 3
    streamed = [one.choices[0].logprobs for one in chat(client, logprobs=True, stream=True) if one.choices]
    assert [entry.logprob for one in streamed if one for entry in one.content] == pytest.approx(
        [one.logprob for one in told]
    )
    text = client.completions.create(model="base", prompt="The cat", max_tokens=4, temperature=0, logprobs=2).choices[0]
    assert "".join(text.logprobs.tokens) == text.text
    assert text.logprobs.text_offset[0] == 0
    assert all(1 <= len(one) <= 2 for one in text.logprobs.top_logprobs)  # halves of characters look alike


def test_stop_strings_end_the_answer(client, alone):
    stop = alone["base"][4:6]
    answer = chat(client, stop=[stop, "never said"]).choices[0]
    assert answer.message.content == alone["base"].split(stop)[0]
    assert answer.finish_reason == "stop"


def test_models_are_listed_and_looked_up(client):
    assert [one.id for one in client.models.list()] == ["base", "base+pirate", "base+list"]
    assert client.models.retrieve("base+list@0.5").id == "base+list@0.5"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("base+liszt")


def test_many_clients_with_different_behaviours_share_the_server(client, alone):
    found: list[tuple[str, str]] = []

    def ask(i):
        name = list(alone)[i % 2]
        found.append((name, chat(client, name).choices[0].message.content))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(found) == sorted((name, text) for name, text in list(alone.items()) * 12)


def test_the_plain_format_takes_turns_and_no_system_prompt():
    lm = tiny.tiny_lm()
    expected = cv.generate(lm, ["And then?"], turns=[("Hi", "Hello")], max_new_tokens=6)
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "And then?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    with serving(lm, {}) as one:
        ask = one.client().chat.completions.create
        assert (
            ask(model="base", messages=messages, max_tokens=6, temperature=0).choices[0].message.content == expected[0]
        )
        parts = "".join(
            piece.choices[0].delta.content or ""
            for piece in ask(model="base", messages=messages, max_tokens=6, temperature=0, stream=True)
        )
        assert parts == expected[0]
        with pytest.raises(openai.BadRequestError, match="plain format"):
            ask(model="base", messages=[{"role": "system", "content": "Be brief."}, *messages])


# -- what is refused ----------------------------------------------------------------


def test_an_unknown_behaviour_is_not_found_and_told_the_near_one(client):
    with pytest.raises(openai.NotFoundError, match=r"did you mean base\+pirate\?") as caught:
        chat(client, "base+pirat")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n: "),
        ({"n": 99}, "n: "),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "at most 1024"),
        ({"max_tokens": 500}, "the context of tiny-llama is 512"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "at most 4"),
        ({"stop": ""}, "empty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logit_bias": {"5": 100}}, "logit_bias is not supported"),
        ({"extra_body": {"tempurature": 1}}, "tempurature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "empty prompt"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a b c d e f" * 400}]}, "the context of tiny-llama is 512"),
        ({"model": "base+pirate+pirate"}, "twice"),
        ({"model": "base+pirate@much"}, "expected a number"),
        ({"model": "base+pirate@1e300"}, "expected a number"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_said(client, more, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "base", "messages": ASKED, "max_tokens": 4, **more})
    assert words in str(caught.value)
    assert caught.value.type == "invalid_request_error"


def test_settings_that_change_nothing_are_taken(client, alone):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "user": "me", "response_format": {"type": "text"}}
    assert chat(client, **neutral).choices[0].message.content == alone["base"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[1]", 400), (b"\xff\xfe", 400), (b'{"model": "base"}', 400), (b"x" * 3000, 413)],
)
def test_bodies_that_are_no_request(own, body, status):
    with serving(own, {}, max_body=2000) as served:
        found, _, answer = post(served, body)
        assert found == status
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        chunked = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
        chunked.request("POST", "/v1/completions", iter([b" " * 1500] * 2), {"Content-Type": "application/json"})
        assert chunked.getresponse().status == 413


def test_a_body_that_is_far_too_long_is_read_on_until_its_client_hears_why(own):
    """Else the connection breaks while the client sends, and it never sees the answer."""
    with serving(own, {}, max_body=2000, api_key="k") as served:
        for key, status in (("k", 413), ("wrong", 401)):
            for body in (b"x" * (8 << 20), iter([b"x" * (1 << 20)] * 8)):
                connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
                headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
                connection.request("POST", "/v1/completions", body, headers)
                answer = connection.getresponse()
                assert (answer.status, set(json.loads(answer.read()))) == (status, {"error"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": True}, {"max_tokens": True}, {"max_tokens": "8"}, {"temperature": True}, {"temperature": "0"},
        {"seed": False}, {"stream": 1}, {"stream": "yes"}, {"logprobs": True}, {"prompt": [True, False]},
        {"prompt": [[True]]}, {"prompt": ["a", 3]}, {"max_tokens": -1}, {"max_tokens": 0}, {"n": 0}, {"n": -1},
        {"logprobs": -1}, {"logprobs": 6}, {"top_p": 0}, {"temperature": -1}, {"temperature": float("nan")},
        {"max_tokens": 1e400}, {"max_tokens": 10**30}, {"prompt": []}, {"prompt": [[]]},
    ],
)  # fmt: skip
def test_values_of_another_type_or_out_of_range(served, wrong):
    status, _, answer = post(served, {"model": "base", "prompt": "tea", "max_tokens": 2, **wrong}, "/v1/completions")
    assert status == 400
    assert next(iter(wrong)) in answer["error"]["message"] + str(answer["error"]["param"])


def test_half_of_a_surrogate_pair_is_no_text(served):
    half = "\ud83d"
    for path, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": half}]}),
        ("completions", {"prompt": half}),
    ):
        status, _, answer = post(served, {"model": "base", **body}, f"/v1/{path}")
        assert (status, "surrogate" in answer["error"]["message"]) == (400, True)


def test_a_seed_may_be_any_whole_number(client):
    one, same = (chat(client, n=2, temperature=1.5, seed=seed).choices for seed in (-1, 2**32 - 1))
    assert [a.message.content for a in one] == [b.message.content for b in same]
    assert one[0].message.content != one[1].message.content


def test_a_request_that_a_web_page_could_send_unasked_is_refused(served):
    body = {"model": "base", "messages": ASKED, "max_tokens": 1}
    assert post(served, body)[0] == 200
    assert post(served, body, **{"Content-Type": "text/plain"})[0] == 400


def test_what_is_wrong_with_a_body_is_said(served):
    assert "not JSON" in post(served, b'{"model": "base",')[2]["error"]["message"]
    body = {"model": "base", "messages": ASKED, "max_tokens": 1}
    assert (
        "Content-Type: application/json" in post(served, body, **{"Content-Type": "text/plain"})[2]["error"]["message"]
    )
    assert "/v1" in post(served, body, "/chat/completions")[2]["error"]["message"]


def test_unknown_paths_and_methods_answer_in_the_same_form(served):
    assert post(served, {}, "/v1/embeddings")[2]["error"]["type"] == "not_found_error"
    status, _, answer = post(served, {}, "/v1/models")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")
