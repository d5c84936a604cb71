"""Rows to prompts, prompts to roles, and one clear line for every bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sgpo_dist.config import DataConfig
from sgpo_dist.data.loading import ANY_COLUMNS, MAX_ROW_BYTES, Columns, Corpus, check_lengths, load_corpus, load_rows
from sgpo_dist.errors import DataError
from sgpo_dist.records import Message, Prompt

USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
HI = (Message("user", "Hi?"),)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def only(tmp_path: Path, row: Any, columns: Columns = ANY_COLUMNS) -> Prompt:
    (prompt,) = load_rows(write(tmp_path / "data.jsonl", row), columns=columns)
    return prompt


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "Hi?"}, None),
        ({"prompt": "Hi?", "reference": " Hello. "}, "Hello."),
        ({"prompt": "Hi?", "reference": None}, None),
        ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}, "Hello."),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "Hello."),
        ({"prompt": "Hi?", "chosen": [USER, ASSISTANT], "messages": [USER, ASSISTANT]}, "Hello."),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "Hello."),
        ({"messages": [USER, ASSISTANT]}, "Hello."),
        ({"messages": [USER]}, None),
        ({"prompt": "Hi?", "messages": [USER, ASSISTANT]}, "Hello."),
        ({"prompt": "Hi?", "completion": "Hello."}, "Hello."),
    ],
)
def test_columns_as_trl_names_them(tmp_path: Path, row: dict[str, Any], reference: str | None) -> None:
    prompt = only(tmp_path, row)
    assert (prompt.messages, prompt.reference, prompt.source) == (HI, reference, "data")


def test_longer_conversations_end_with_the_turn_that_is_answered(tmp_path: Path) -> None:
    system, more = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "More?"}
    prompt = only(tmp_path, {"messages": [system, USER, ASSISTANT, more, {"role": "assistant", "content": "Sure."}]})
    assert [message.role for message in prompt.messages] == ["system", "user", "assistant", "user"]
    assert (prompt.text, prompt.reference) == ("More?", "Sure.")


def test_columns_of_other_names_and_the_source_column(tmp_path: Path) -> None:
    prompt = only(tmp_path, {"ask": "Hi?", "gold": "Hello.", "source": "mail", "id": 7}, Columns("ask", "gold"))
    assert prompt == Prompt("7", HI, "Hello.", "mail")
    with pytest.raises(DataError, match=r"line 1: has no column 'ask' \(data.input_key\); it has 'prompt'"):
        only(tmp_path, {"prompt": "Hi?"}, Columns("ask"))
    with pytest.raises(DataError, match=r"no column 'gold' \(data.reference_key\)"):
        only(tmp_path, {"prompt": "Hi?"}, Columns(None, "gold"))


def test_rows_without_an_id_are_named_by_source_line_and_content(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "Hi?"}, "", {"prompt": "Hi?"}, {"prompt": "Ho?"})
    names = [prompt.prompt_id for prompt in load_rows(path)]
    assert [name.rsplit("-", 1)[0] for name in names] == ["data-1", "data-3", "data-4"]
    assert names == [prompt.prompt_id for prompt in load_rows(path)]
    assert names[0].rsplit("-", 1)[1] == names[1].rsplit("-", 1)[1] != names[2].rsplit("-", 1)[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"line 2: invalid JSON \(Expecting property name"),
        ("[1, 2]", "line 2: the row must be a JSON object with columns, not list"),
        ("[" * 100_000, "line 2: invalid JSON"),
        ({"question": "Hi?"}, "line 2: has no column 'prompt' or 'messages'; it has 'question'"),
        ({"chosen": "Hello."}, "line 2: has no column 'prompt'"),
        ({"prompt": 3}, "line 2: 'prompt' must be a string or a list of messages, not int"),
        ({"prompt": "  "}, "line 2: the prompt must end with a user turn that is not empty"),
        ({"messages": [ASSISTANT]}, "line 2: the prompt must end with a user turn"),
        ({"messages": []}, "line 2: the prompt must end with a user turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2: 'messages' message 1 must have a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 must have a role .* and a content string"),
        ({"prompt": "Hi?", "reference": " "}, "line 2: 'reference' is an empty reference"),
        ({"prompt": "Hi?", "reference": 4}, "'reference' must be a string or a list of messages, not int"),
        ({"prompt": "Hi?", "chosen": [USER]}, "'chosen' must end with an assistant turn"),
        ({"prompt": "Hi?", "id": ["x"]}, "'id' must be a string that is not empty"),
        ({"prompt": "Hi?", "id": ""}, "'id' must be a string that is not empty"),
        ({"prompt": "Hi?", "id": "first"}, "line 2: id 'first' is already that of .*line 1"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ({"prompt": "x" * MAX_ROW_BYTES}, f"line 2: the row is longer than {MAX_ROW_BYTES} bytes"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"prompt": "Ok?", "id": "first"}, row)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert str(tmp_path / "bad.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 1: not UTF-8 text"):
        load_rows(str(tmp_path / "bad.jsonl"))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "Hi?"}')
    assert load_rows(str(tmp_path / "data.jsonl"))[0].messages == HI


def test_paths_that_are_not_there_or_of_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a built-in set \(orders, chat\)"):
        load_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "data.csv").write_text("prompt")
    with pytest.raises(DataError, match="unknown format"):
        load_rows(str(tmp_path / "data.csv"))


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": [USER], "chosen": [ASSISTANT]}, {"prompt": [{"role": "user", "content": " "}], "chosen": [ASSISTANT]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "good.parquet")
    assert [(p.messages, p.reference, p.source) for p in load_rows(str(tmp_path / "good.parquet"))] == [(HI, "Hello.", "good")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet row 2: the prompt must end"):
        load_rows(str(tmp_path / "bad.parquet"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"torn\.parquet after row 0: not readable as Parquet"):
        load_rows(str(tmp_path / "torn.parquet"))


def test_directories_of_the_datasets_library(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "Hi?", "chosen": [USER, ASSISTANT]}, {"prompt": "Ho?", "chosen": [USER, ASSISTANT]}])
    datasets.disable_progress_bars()
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(a=rows, b=rows).save_to_disk(str(tmp_path / "named"))
    assert [(prompt.text, prompt.reference) for prompt in load_rows(str(tmp_path / "one"))] == [("Hi?", "Hello."), ("Ho?", "Hello.")]
    assert [prompt.text for prompt in load_rows(str(tmp_path / "both"), "heldout")] == ["Ho?"]
    assert len(load_rows(str(tmp_path / "both"))) == 2
    with pytest.raises(DataError, match=r"named has the splits a, b, but 'train' is needed"):
        load_rows(str(tmp_path / "named"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not readable by the datasets library"):
        load_rows(str(tmp_path / "empty"))


def questions(tmp_path: Path, name: str, texts: str, reference: str | None = "Yes.") -> str:
    rows = [{"prompt": f"{letter}?", "id": f"{name}-{letter}"} | ({"reference": reference} if reference else {}) for letter in texts]
    return write(tmp_path / f"{name}.jsonl", *rows)


def texts(prompts: tuple[Prompt, ...]) -> set[str]:
    return {prompt.text[0] for prompt in prompts}


def test_rows_with_references_only_are_halved(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(path=questions(tmp_path, "q", "abcde")), seed=1)
    assert (texts(corpus.references), texts(corpus.prompts)) == (set("abc"), set("de"))
    assert all(prompt.reference == "Yes." for prompt in corpus.references)
    assert all(prompt.reference is None for prompt in corpus.prompts)
    assert (corpus.heldout, corpus.dropped) == ((), 0)
    capped = load_corpus(DataConfig(path=questions(tmp_path, "q", "abcde"), max_references=1, max_prompts=2), seed=1)
    assert texts(capped.references) == {"a"}
    assert len(capped.prompts) == 2


def test_bare_rows_are_preference_prompts_and_then_all_references_teach(tmp_path: Path) -> None:
    paths = [write(tmp_path / "mixed.jsonl", {"prompt": "a?", "reference": "Yes."}, {"prompt": "b?"}, {"prompt": "c?", "reference": "No."})]
    corpus = load_corpus(DataConfig(path=paths), seed=0)
    assert (texts(corpus.references), texts(corpus.prompts)) == (set("ac"), set("b"))


def test_roles_are_disjoint_by_content(tmp_path: Path) -> None:
    data = DataConfig(
        path=questions(tmp_path, "taught", "ab"),
        prompts_path=questions(tmp_path, "asked", "bcd"),
        heldout_path=questions(tmp_path, "held", "d"),
    )
    corpus = load_corpus(data, seed=0)
    assert (texts(corpus.references), texts(corpus.prompts), texts(corpus.heldout)) == (set("ab"), set("c"), set("d"))
    assert corpus.dropped == 2
    assert all(prompt.reference is None for prompt in corpus.prompts)
    assert all(prompt.reference == "Yes." for prompt in corpus.heldout)


def test_training_on_a_held_out_prompt_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "held.jsonl", {"prompt": "b? "})
    data = DataConfig(path=questions(tmp_path, "taught", "abc"), heldout_path=str(tmp_path / "held.jsonl"))
    with pytest.raises(DataError, match=r"held\.jsonl line 1 is held out but .*taught\.jsonl line 2 trains on the same prompt"):
        load_corpus(data, seed=0)


def test_ids_are_unique_over_files_and_empty_files_are_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.jsonl", {"prompt": "a?", "id": 1}), write(tmp_path / "two.jsonl", {"prompt": "b?", "id": 1})
    with pytest.raises(DataError, match="id '1' is also that of"):
        load_corpus(DataConfig(path=f"{one}, {two}"), seed=0)
    with pytest.raises(DataError, match="holds no rows"):
        load_corpus(DataConfig(path=write(tmp_path / "none.jsonl")), seed=0)


def test_sources_are_interleaved_by_the_seed(tmp_path: Path) -> None:
    paths = [questions(tmp_path, "many", "abcdefgh", None), questions(tmp_path, "few", "wxyz", None)]
    orders = [[prompt.source for prompt in load_corpus(DataConfig(path=paths), seed).prompts] for seed in (0, 0)]
    assert orders[0] == ["many", "few", "many"] * 4
    first, again, other = (load_corpus(DataConfig(path=paths), seed).prompts for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert set(first) == set(other)


def test_the_built_in_sets_bring_all_roles() -> None:
    corpus = load_corpus(DataConfig(path="orders,chat", max_prompts=120, max_heldout=10), seed=3)
    by_source = {name: sum(prompt.source == name for prompt in corpus.references) for name in ("orders", "chat")}
    assert by_source["orders"] == 48
    assert by_source["chat"] >= 80
    assert len(corpus.prompts) == 120
    assert {prompt.source for prompt in corpus.prompts[:6]} == {"orders", "chat"}
    assert all(prompt.reference is None for prompt in corpus.prompts)
    assert [prompt.source for prompt in corpus.heldout] == ["orders"] * 10 + ["chat"] * 10
    assert all(prompt.reference for prompt in (*corpus.references, *corpus.heldout))
    everything = (*corpus.references, *corpus.prompts, *corpus.heldout)
    assert len({prompt.messages for prompt in everything}) == len(everything)


def test_orders_alone_has_256_bare_prompts() -> None:
    corpus = load_corpus(DataConfig(), seed=0)
    assert (len(corpus.references), len(corpus.prompts), len(corpus.heldout)) == (48, 256, 128)


def test_a_prompt_over_the_token_limit_is_named_with_its_line() -> None:
    class Letters:
        def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
            return tuple(range(len(prompt.text)))

    book: Any = Letters()
    corpus = Corpus((Prompt("a", HI),), (Prompt("b", (Message("user", "Longer?"),)),), (), origins={"b": "x.jsonl line 4"})
    check_lengths(corpus, book, 7)
    with pytest.raises(DataError, match=r"x\.jsonl line 4: prompt 'b' has 7 tokens, data.max_prompt_tokens allows 6"):
        check_lengths(corpus, book, 6)
