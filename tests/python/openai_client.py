"""Talks to a coel node with the unmodified `openai` client from PyPI.

    python openai_client.py BASE_URL MODEL [EXPECTED]

BASE_URL is the node's address (http://127.0.0.1:PORT, with or without /v1), MODEL one that it lists. EXPECTED is a text
that the answer to "What is the capital of France?" must contain. A key is read from OPENAI_API_KEY, where the node
requires one.

Prints one JSON document with what it got; `failed` lists the checks that did not hold. Exit code: 0 if all held, 1 if
not, 2 for wrong usage. Every check compares the node with itself or with the API's contract, so any model will do.
"""

import json
import os
import sys
import traceback

import openai

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The capital of France is"


class Checks:
    """Runs checks one by one; one that fails does not keep the next from running."""

    def __init__(self):
        self.results = {}
        self.failed = {}

    def run(self, check, *arguments):
        name = check.__name__
        try:
            self.results[name] = check(*arguments)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.failed[name] = f"{type(error).__name__}: {error} (line {where.lineno}: {where.line})"
        return self.results.get(name)


def same(got, expected, what):
    if got != expected:
        raise AssertionError(f"{what}: got {got!r}, expected {expected!r}")


def holds(condition, what):
    if not condition:
        raise AssertionError(what)


def counts(usage):
    """Usage as a dict, after checking that it adds up and says where the work was done."""
    holds(usage is not None, "no usage")
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")
    holds(usage.prompt_tokens > 0 and usage.completion_tokens > 0, "tokens were counted")
    counted = usage.model_dump()
    same(sorted(counted["coel"]), ["other_classes", "precisions", "rows_local", "rows_remote"], "usage.coel")
    return counted


def models(client, model):
    listed = [entry.id for entry in client.models.list()]
    holds(listed, "a model is listed")
    found = client.models.retrieve(model)
    same((found.object, found.owned_by), ("model", "coel"), "the model's object and owner")
    return {"listed": listed, "retrieved": found.id}


def chat(client, model, expected):
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    same(reply.object, "chat.completion", "object")
    same(reply.model, model, "model")
    holds(reply.id.startswith("chatcmpl-"), f"id {reply.id}")
    same(len(reply.choices), 1, "choices")
    choice = reply.choices[0]
    same(choice.message.role, "assistant", "role")
    holds(choice.message.content, "an answer")
    holds(choice.finish_reason in ("stop", "length"), f"finish_reason {choice.finish_reason}")
    holds(choice.logprobs is None, "no logprobs unless asked for")
    if expected is not None:
        holds(expected in choice.message.content, f"{expected!r} is not in {choice.message.content!r}")
    return {
        "answer": choice.message.content,
        "finish_reason": choice.finish_reason,
        "usage": counts(reply.usage),
    }


def chat_streamed(client, model, whole):
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    same({chunk.object for chunk in chunks}, {"chat.completion.chunk"}, "objects")
    same(len({chunk.id for chunk in chunks}), 1, "ids of one stream")
    *spoken, last = chunks
    same(last.choices, [], "choices of the usage chunk")
    holds(all(chunk.usage is None for chunk in spoken), "usage comes last")
    same(spoken[0].choices[0].delta.role, "assistant", "the first delta's role")
    pieces = [chunk.choices[0].delta.content or "" for chunk in spoken]
    reasons = [chunk.choices[0].finish_reason for chunk in spoken]
    same(reasons[:-1], [None] * (len(reasons) - 1), "finish_reason before the end")
    same("".join(pieces), whole["answer"], "the stream's text")
    same(reasons[-1], whole["finish_reason"], "the stream's finish_reason")
    usage = counts(last.usage)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        same(usage[name], whole["usage"][name], f"the stream's {name}")
    return {"chunks": len(chunks), "answer": "".join(pieces), "usage": usage}


def chat_in_parts(client, model, whole):
    """The same question as text parts, with the newer name of the token limit."""
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        max_completion_tokens=whole["usage"]["completion_tokens"],
    )
    same(reply.choices[0].message.content, whole["answer"], "the answer to the same question in parts")
    return {"answer": reply.choices[0].message.content}


def chat_cut(client, model, whole):
    """One token is one token."""
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=1)
    same(reply.usage.completion_tokens, 1, "completion_tokens")
    holds(whole["answer"].startswith(reply.choices[0].message.content), "the beginning of the same answer")
    if whole["usage"]["completion_tokens"] > 1:
        same(reply.choices[0].finish_reason, "length", "finish_reason")
    return {"answer": reply.choices[0].message.content}


def chat_logprobs(client, model, whole):
    reply = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    listed = reply.choices[0].logprobs.content
    holds(listed, "logprobs are listed")
    text = bytes(byte for entry in listed for byte in entry.bytes).decode()
    same(text, whole["answer"], "the tokens' bytes, put together")
    for entry in listed:
        ranked = [top.logprob for top in entry.top_logprobs]
        same(len(ranked), 3, "top_logprobs")
        same(ranked, sorted(ranked, reverse=True), "best first")
        same(entry.logprob, ranked[0], "temperature 0 takes the best")
        holds(entry.logprob <= 0, f"logprob {entry.logprob}")
    return {"tokens": [entry.token for entry in listed], "logprobs": [entry.logprob for entry in listed]}


def stop(client, model, whole):
    """A piece out of the middle of the answer ends it there."""
    answer = whole["answer"]
    middle = len(answer) // 2
    word = answer[middle : middle + 3]
    holds(word, "an answer long enough")
    expected = answer[: answer.index(word)]
    for value in (word, ["\u2603 never said", word]):
        reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, stop=value)
        same(reply.choices[0].message.content, expected, f"the answer before {word!r}")
        same(reply.choices[0].finish_reason, "stop", "finish_reason")
    return {"stop": word, "answer": expected}


def seed(client, model):
    """Sampled answers with one seed are one answer; with several seeds, not all are."""

    def sampled(seed):
        return client.completions.create(
            model=model, prompt="The", temperature=1.5, top_p=0.98, seed=seed, max_tokens=24
        ).choices[0].text

    first, second = sampled(42), sampled(42)
    same(second, first, "the second answer with the same seed")
    others = [sampled(other) for other in range(4)]
    holds(len({first, *others}) > 1, f"five seeds gave one answer: {first!r}")
    return {"answer": first, "others": others}


def completion(client, model):
    arguments = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    reply = client.completions.create(**arguments)
    same(reply.object, "text_completion", "object")
    holds(reply.id.startswith("cmpl-"), f"id {reply.id}")
    usage = counts(reply.usage)
    holds(usage["completion_tokens"] <= 12, "max_tokens")
    text = reply.choices[0].text
    streamed = list(client.completions.create(**arguments, stream=True))
    same("".join(chunk.choices[0].text for chunk in streamed), text, "the stream's text")
    same(streamed[-1].choices[0].finish_reason, reply.choices[0].finish_reason, "the stream's finish_reason")
    same(client.completions.create(**{**arguments, "prompt": [PROMPT]}).choices[0].text, text, "a list of one prompt")
    return {"text": text, "finish_reason": reply.choices[0].finish_reason, "usage": usage}


def completion_logprobs(client, model):
    reply = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=8, logprobs=2)
    listed = reply.choices[0].logprobs
    count = len(listed.tokens)
    holds(count > 0, "logprobs are listed")
    same([len(listed.token_logprobs), len(listed.top_logprobs), len(listed.text_offset)], [count] * 3, "lengths")
    if not any(token.startswith("bytes:") for token in listed.tokens):
        same("".join(listed.tokens), reply.choices[0].text, "the tokens, put together")
        ends = [0]
        for token in listed.tokens:
            ends.append(ends[-1] + len(token))
        same(listed.text_offset, ends[:-1], "text_offset")
    for token, logprob, top in zip(listed.tokens, listed.token_logprobs, listed.top_logprobs):
        same(top[token], logprob, "the chosen token among the likeliest")
        same(max(top.values()), logprob, "temperature 0 takes the best")
    return {"tokens": listed.tokens, "token_logprobs": listed.token_logprobs}


def refused(kind, status, code, param, call):
    try:
        call()
    except kind as error:
        same((error.status_code, error.code, error.param), (status, code, param), "status, code and param")
        return {"error": type(error).__name__, "message": error.message}
    raise AssertionError(f"{kind.__name__} was not raised")


def unknown_model(client, model):
    ask = lambda: client.chat.completions.create(model=f"{model}-unknown", messages=QUESTION)
    refused(openai.NotFoundError, 404, "model_not_found", "model", lambda: client.models.retrieve("unknown"))
    return refused(openai.NotFoundError, 404, "model_not_found", "model", ask)


def empty_messages(client, model):
    ask = lambda: client.chat.completions.create(model=model, messages=[])
    return refused(openai.BadRequestError, 400, "empty_array", "messages", ask)


def out_of_range(client, model):
    ask = lambda: client.chat.completions.create(model=model, messages=QUESTION, temperature=3)
    return refused(openai.BadRequestError, 400, "invalid_value", "temperature", ask)


def unsupported(client, model):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    ask = lambda: client.chat.completions.create(model=model, messages=QUESTION, tools=[tool])
    return refused(openai.BadRequestError, 400, "unsupported_parameter", "tools", ask)


def too_long(client, model):
    ask = lambda: client.completions.create(model=model, prompt=PROMPT * 20_000)
    return refused(openai.BadRequestError, 400, "context_length_exceeded", "prompt", ask)


def main():
    if len(sys.argv) not in (3, 4):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    base, model = sys.argv[1].rstrip("/"), sys.argv[2]
    expected = sys.argv[3] if len(sys.argv) == 4 else None
    base = base if base.endswith("/v1") else f"{base}/v1"
    client = openai.OpenAI(base_url=base, api_key=os.environ.get("OPENAI_API_KEY", "none needed"), timeout=300)

    checks = Checks()
    checks.run(models, client, model)
    whole = checks.run(chat, client, model, expected)
    if whole is not None:
        for check in (chat_streamed, chat_in_parts, chat_cut, chat_logprobs, stop):
            checks.run(check, client, model, whole)
    for check in (
        seed,
        completion,
        completion_logprobs,
        unknown_model,
        empty_messages,
        out_of_range,
        unsupported,
        too_long,
    ):
        checks.run(check, client, model)
    document = {"client": openai.__version__, "base_url": base, "model": model, **checks.results}
    print(json.dumps({**document, "failed": checks.failed}, indent=2, ensure_ascii=False))
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
