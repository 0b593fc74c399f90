"""Data files in every form that the field uses: read, or refused in one message with what to write."""

import contextlib
import gzip
import io
import json
import random
import re
import sys

import pytest
from huggingface_hub import constants

from coconut_ds.__main__ import main
from coconut_ds.data.forms import field_of, local_file, use_cache_without_network
from coconut_ds.data.problems import Problem, read_problems
from coconut_ds.data.tokenizer import cached_tokens, load_vocabulary
from coconut_ds.errors import DataError

ITEMS = [
    {"question": f"{a} + 1 + 2 + 3 ?", "steps": [f"{a} + 1 = {a + 1}", "x = 2"], "answer": str(a)}
    for a in range(4)
]
PROBLEMS = [Problem(item["question"], tuple(item["steps"]), item["answer"]) for item in ITEMS]
LINES = "\n".join(map(json.dumps, ITEMS))
COLUMNS = {key: [item[key] for item in ITEMS] for key in ITEMS[0]}


def csv_text(delimiter):
    import csv

    writer = io.StringIO()
    rows = csv.DictWriter(writer, list(ITEMS[0]), delimiter=delimiter)
    rows.writeheader()
    rows.writerows(item | {"steps": "\n".join(item["steps"])} for item in ITEMS)
    return writer.getvalue()


def parquet(items=ITEMS):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(items), content)
    return content.getvalue()


FORMS = {
    "list.json": json.dumps(ITEMS),
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "blank_lines.jsonl": LINES.replace("\n", "\n\n\r\n"),
    "bom.json": "\ufeff" + json.dumps(ITEMS),
    "bom.jsonl": "\ufeff" + LINES,
    "wrapped.json": json.dumps({"data": ITEMS}),
    "with_metadata.json": json.dumps({"version": 1, "license": "MIT", "tags": ["a"], "rows": ITEMS}),
    "columns.json": json.dumps(COLUMNS),
    "list.json.gz": gzip.compress(json.dumps(ITEMS).encode()),
    "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "table.csv": csv_text(","),
    "table.tsv": csv_text("\t"),
    "table.csv.gz": gzip.compress(csv_text(",").encode()),
    "rows.parquet": parquet,
}


def content_of(name):
    content = FORMS[name]() if callable(FORMS[name]) else FORMS[name]
    return content.encode() if isinstance(content, str) else content


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_problems(name, tmp_path):
    (tmp_path / name).write_bytes(content_of(name))
    assert read_problems(tmp_path / name) == PROBLEMS
    assert main(["validate", str(tmp_path / name)]) == 0


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"answer": 7}, Problem("q", ("a",), "7")),
        ({"answer": 2.50}, Problem("q", ("a",), "2.5")),
        ({"steps": "a\nb\n"}, Problem("q", ("a", "b"), "4")),
        ({"steps": "<<1+1=2>> <<2+2=4>>"}, Problem("q", ("<<1+1=2>>", "<<2+2=4>>"), "4")),
        ({"steps": "so <<1+1=2>> <<2+2=4>>"}, Problem("q", ("so <<1+1=2>> <<2+2=4>>",), "4")),
        ({"steps": "['a', \"b's\"]"}, Problem("q", ("a", "b's"), "4")),
        ({"steps": "[1, 2) is half open"}, Problem("q", ("[1, 2) is half open",), "4")),
        ({"steps": ""}, Problem("q", (), "4")),
    ],
)
def test_values_are_read_as_meant(changes, problem, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"question": "q", "steps": ["a"], "answer": "4"} | changes]))
    assert read_problems(tmp_path / "a.json") == [problem]


def test_steps_and_answer_of_one_field_are_divided_at_the_mark(tmp_path):
    items = [{"q": "x", "a": "1+1=2\n2+2=4\n#### 1,004"}, {"q": "y", "a": "#### 3"}, {"q": "z", "a": "5"}]
    (tmp_path / "a.json").write_text(json.dumps(items))
    fields = {"question": "q", "steps": "a", "answer": "a"}
    with pytest.raises(DataError, match="item 2, 'answer': missing; .* it follows '####'"):
        read_problems(tmp_path / "a.json", None, fields)
    (tmp_path / "b.json").write_text(json.dumps(items[2:]))
    with pytest.raises(DataError, match="b.json: item 0, 'answer': missing; .* it follows '####'"):
        read_problems(tmp_path / "b.json", None, fields)
    problems = read_problems(tmp_path / "a.json", 2, fields)
    assert problems == [Problem("x", ("1+1=2", "2+2=4"), "1,004"), Problem("y", (), "3")]


def test_numbers_stay_as_they_are_written(tmp_path):
    answers = ["1.50", "1e3", "-0", "123456789012345678901234567890"]
    items = ",".join(f'{{"question": "q", "steps": [], "answer": {answer}}}' for answer in answers)
    (tmp_path / "a.json").write_text(f"[{items}]")
    assert [problem.answer for problem in read_problems(tmp_path / "a.json")] == answers
    (tmp_path / "a.parquet").write_bytes(parquet([{"question": "q", "steps": [], "answer": 72.0}]))
    assert read_problems(tmp_path / "a.parquet")[0].answer == "72"


OTHER_FORMS = {
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, "{question: instruction, answer: output}"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "{question: conversations.0.value, answer: conversations.1.value}",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "{question: messages.0.content, answer: messages.1.content}",
    ),
    "metamath": ({"query": "a", "response": "b", "type": "x"}, "{question: query, answer: response}"),
    "with cot": (
        {"problem": "a", "cot": "c", "output": "b"}, "{question: problem, steps: cot, answer: output}",
    ),
    "gsm8k": ({"question": "a", "answer": "2 <<1+1=2>>\n#### 2"}, "gsm8k.py --form original --source FOLDER"),
    "gsm8k fields": ({"question": "a", "answer": "1+1=2\n#### 2"}, "fields: {steps: answer}"),
    "chat with steps": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n#### 2"}]},
        "{question: messages.0.content, steps: messages.1.content, answer: messages.1.content}",
    ),
    "system first": (
        {"messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b\n#### 2"},
        ]},
        "{question: messages.1.content, steps: messages.2.content, answer: messages.2.content}'; the lines "
        "before #### are the steps, the text after it the answer",
    ),
    "sharegpt with system": (
        {"conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
        ]},
        "{question: conversations.1.value, answer: conversations.2.value}",
    ),
    "capitals": (
        {"Problem": "a", "Reasoning": "c", "gold": "2"},
        "{question: Problem, steps: Reasoning, answer: gold}",
    ),
    "math": ({"problem": "a", "solution": "\\boxed{2}"}, "hendrycks_math.py --source FOLDER"),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("name", ["list.json", "one.jsonl"])
def test_another_form_gets_one_message_that_reads_or_converts_it(form, name, tmp_path, capsys):
    item, words = OTHER_FORMS[form]
    path = tmp_path / name
    path.write_text(json.dumps([item, item]) if name == "list.json" else json.dumps(item))
    assert main(["validate", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert words in line and str(path) in line
    if "fields: {" not in line:
        return
    fields = line.partition("'fields: ")[2].partition("'")[0]
    assert main(["validate", str(path), "--set", f"fields={fields}"]) == 0


def test_only_the_field_that_is_missing_is_named(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([OTHER_FORMS["system first"][0]]))
    with pytest.raises(DataError) as caught:
        read_problems(path, None, {"question": "messages.1.content", "steps": "messages.2.content"})
    assert ", not 'answer'; name them" in str(caught.value)
    assert "{question: messages.1.content, steps: messages.2.content, answer: messages.2" in str(caught.value)


@pytest.mark.parametrize(
    "delimiter, name", [(", ", "a.csv"), (";", "a.csv"), ("\t", "a.csv"), (",", "a.tsv"), (";", "a.csv.gz")]
)
def test_tables_of_other_delimiters(delimiter, name, tmp_path):
    lines = [["question", "steps", "answer"], ["1,5 + 1", "[]", "2,5"]]
    text = "\n".join(delimiter.join(f'"{cell}"' for cell in line) for line in lines)
    data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    (tmp_path / name).write_bytes(data)
    assert read_problems(tmp_path / name) == [Problem("1,5 + 1", (), "2,5")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("count", [1, 5000])
def test_utf16_is_named(name, count, tmp_path, capsys):
    (tmp_path / name).write_text(json.dumps(ITEMS * count), encoding="utf-16")
    assert main(["validate", str(tmp_path / name)]) == 2
    assert "is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["https://example.com/a.json", "http://example.com/a.csv"])
def test_a_url_must_be_downloaded(name, capsys):
    assert main(["validate", name]) == 2
    assert "is a URL; download the file" in capsys.readouterr().err


@pytest.mark.parametrize("item", [
    {"question": " a\n", "steps": [" b ", "\tc\n", " "], "answer": " 10\n"},
    {"question": "\na", "steps": " b \n\n c \n", "answer": "\t10"},
])  # fmt: skip
def test_whitespace_around_texts_is_removed(item, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([item]))
    assert read_problems(tmp_path / "a.json") == [Problem("a", ("b", "c"), "10")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("question:prompt", "fields: must be {question: NAME"),
        ("{step: cot}", "fields.step: is not a setting; did you mean .steps."),
    ],
)
def test_fields_are_checked_without_an_experiment(tmp_path, capsys, fields, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "1+1", "cot": ["1+1=2"], "answer": "2"}]))
    assert main(["validate", str(path), "--set", f"fields={fields}"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_gsm8k_lines_and_tables_without_their_ending_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("1 + 1||<<1+1=2>> #### 2\n")
    with pytest.raises(DataError, match="--form icot --source FOLDER"):
        read_problems(tmp_path / "a.txt")
    (tmp_path / "b.json").write_text("question,steps,answer\n1,2,3\n")
    with pytest.raises(DataError, match="a table ends in .csv or .tsv"):
        read_problems(tmp_path / "b.json")


def test_a_field_map_is_a_setting(tiny_experiment, tmp_path, capsys):
    """`validate` and the data of a run read one file by it; a file with our names needs none."""
    import yaml

    items = [{"q": item["question"], "a": {"text": item["answer"]}, "cot": item["steps"]} for item in ITEMS]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, items)))
    fields = {"question": "q", "steps": "cot", "answer": "a.text"}
    vocabulary = load_vocabulary(tiny_experiment["model_id"])
    tokens = cached_tokens(tmp_path / "train.jsonl", vocabulary, fields=fields)
    (tmp_path / "plain.json").write_text(json.dumps(ITEMS))
    assert tokens[:] == cached_tokens(tmp_path / "plain.json", vocabulary)[:]
    assert read_problems(tmp_path / "plain.json", None, fields) == PROBLEMS
    experiment = tiny_experiment | {"train_path": str(tmp_path / "train.jsonl"), "fields": fields}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(experiment))
    assert main(["validate", str(tmp_path / "c.yaml")]) == 0
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(experiment | {"fields": {"anwser": "q"}}))
    assert main(["validate", str(tmp_path / "c.yaml")]) == 2
    assert "fields.anwser: is not a setting; did you mean 'answer'?" in capsys.readouterr().err


def test_evaluation_files_may_lack_steps(tmp_path, capsys):
    items = [{"question": "q", "answer": "1"}, {"question": "r", "answer": "2", "steps": ["a"]}]
    (tmp_path / "a.json").write_text(json.dumps(items))
    without = {}
    assert [p.steps for p in read_problems(tmp_path / "a.json", without_steps=without)] == [(), ("a",)]
    assert without == {0: ""}
    with pytest.raises(DataError, match=r"item 0, 'steps': missing; write \[\]"):
        read_problems(tmp_path / "a.json")
    assert main(["validate", str(tmp_path / "a.json")]) == 0
    assert "1 of 2 have no 'steps' field: good for evaluation only" in capsys.readouterr().out


def test_parquet_without_pyarrow_names_the_install_command(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="`pip install pyarrow` installs it"):
        read_problems(tmp_path / "a.parquet")


def test_nested_fields():
    item = {"a.b": 1, "c": [{"d": 2}]}
    assert field_of(item, "a.b") == 1 and field_of(item, "c.0.d") == 2
    for path in ("a", "c.1.d", "c.x", "c.0.d.e"):
        with pytest.raises(KeyError):
            field_of(item, path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Write files into a cache of the hub as `owner/name`, and keep our own cache in tmp_path."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))
    folder = tmp_path / "hub" / "datasets--owner--name"
    sha = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(sha)

    def write(name, content):
        path = folder / "snapshots" / sha / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def test_a_data_set_of_the_hub_is_read_from_the_cache(hub, tiny_experiment):
    hub("data/train-00000-of-00002.parquet", parquet(ITEMS[:2]))
    hub("data/train-00001-of-00002.parquet", parquet(ITEMS[2:]))
    hub("data/test-00000-of-00001.parquet", parquet(ITEMS[:1]))
    hub("README.md", b"train")
    assert read_problems("hf://owner/name:train") == PROBLEMS
    assert read_problems("hf://owner/name:test") == PROBLEMS[:1]
    vocabulary = load_vocabulary(tiny_experiment["model_id"])
    assert len(cached_tokens("hf://owner/name:train", vocabulary)) == len(ITEMS)
    kept = local_file("hf://owner/name@main:train")
    assert kept == local_file("hf://owner/name:train") and len(kept.read_text().splitlines()) == len(ITEMS)
    with pytest.raises(DataError, match="no file of split 'validation'"):
        read_problems("hf://owner/name:validation")


def test_several_configurations_of_a_data_set_are_named(hub):
    hub("main/train.jsonl", LINES.encode())
    hub("socratic/train.jsonl", b"")
    with pytest.raises(DataError, match="hf://owner/name/main:train, hf://owner/name/socratic:train"):
        read_problems("hf://owner/name:train")
    assert read_problems("hf://owner/name/main:train") == PROBLEMS


@pytest.mark.parametrize(
    "name, words",
    [
        ("hf://owner/name", "must be hf://OWNER/NAME:SPLIT"),
        ("hf://name:train", "must be hf://OWNER/NAME:SPLIT"),
        ("hf://nobody/nothing:train", "is not in the cache"),
    ],
)
def test_a_data_set_that_is_not_there(hub, name, words):
    with pytest.raises(DataError, match=words):
        read_problems(name)


def cut(draw, content):
    return content[: draw.randrange(len(content))]


def flipped(draw, content):
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def swapped(draw, content):
    """One piece of text replaced by another that has a meaning in some form."""
    pieces = [b'"', b"[", b"]", b"{", b"}", b",", b"\n", b"\x00", b"null", b"1e999", b"NaN", b"\\ud800"]
    position = draw.randrange(len(content))
    return content[:position] + draw.choice(pieces) + content[position + draw.randrange(12) :]


@pytest.mark.parametrize("name", FORMS)
def test_damaged_files_end_in_a_message(name, tmp_path):
    """15 forms x 14 mutations = 210 files: `validate` ends with 0 or 2, never with a traceback."""
    content = content_of(name)
    path = tmp_path / name
    for seed in range(14):
        draw = random.Random(f"{name} {seed}")
        path.write_bytes((cut, flipped, swapped)[seed % 3](draw, content))
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(["validate", str(path)])
        assert code in (0, 2), (seed, output.getvalue())
        assert code == 0 or "error: " in output.getvalue() or "leak: " in output.getvalue()


@pytest.mark.parametrize(
    ("item", "fields", "question", "answer"),
    [
        ({"input": "q", "target": -9867630.0}, {"question": "input", "answer": "target"}, "q", "-9867630"),
        ({"input": "q", "target": 0.25}, {"question": "input", "answer": "target"}, "q", "0.25"),
        (
            {"Body": "Ann has 3.", "Question": "How many?", "Answer": 3.0, "Equation": "( 3.0 )"},
            {"question": ["Body", "Question"], "answer": "Answer"},
            "Ann has 3. How many?",
            "3",
        ),
        (
            {"sQuestion": " q ", "lSolutions": [8.0]},
            {"question": "sQuestion", "answer": "lSolutions.0"},
            "q",
            "8",
        ),
    ],
)
def test_published_test_sets_of_arithmetic(tmp_path, item, fields, question, answer):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([item]))
    (problem,) = read_problems(path, None, fields, {})
    assert (problem.question.strip(), problem.answer) == (question, answer)


def test_parts_of_a_question_must_be_texts(tmp_path):
    path = tmp_path / "test.json"
    path.write_text('[{"Body": null, "Question": "How many?", "answer": "3"}]')
    with pytest.raises(DataError, match="item 0, 'question': must be text, got a list"):
        read_problems(path, None, {"question": ["Body", "Question"]}, {})


@pytest.mark.parametrize(
    "row, fields, hint",
    [
        ({"step": "a"}, {}, "if 'step' holds them, write 'fields: {steps: step}'"),
        ({"Solution": "a"}, {}, "if 'Solution' holds them, write 'fields: {steps: Solution}'"),
        (
            {"cot": "a"},
            {"steps": "cots"},
            "'fields' names 'cots', none of 'question', 'answer', 'cot'",
        ),
        ({"id": "a"}, {}, "1 of 1 have no 'steps' field: good"),
    ],
)
def test_what_may_be_the_steps_is_named(tmp_path, capsys, row, fields, hint):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"question": "q", "answer": "1", **row}]))
    without = {}
    read_problems(file, fields=fields, without_steps=without)
    assert without[0] in hint or hint in without[0]
    with pytest.raises(DataError) as error:
        read_problems(file, fields=fields)
    assert without[0] in str(error.value)
    if not fields:
        assert main(["validate", str(file)]) == 0
        assert hint in capsys.readouterr().out.replace("\n", " ")


def test_a_solution_that_ends_with_the_answer(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [("1+1=2\n2*3=6\n#### 6", "6"), ("1+1=2\n#### 3", "6"), ("#### 6", "6")]
    file.write_text("\n".join(json.dumps({"q": "q", "s": s, "answer": a}) for s, a in rows))
    problems = read_problems(file, fields={"question": "q", "steps": "s"})
    assert [p.steps for p in problems] == [("1+1=2", "2*3=6"), ("1+1=2", "#### 3"), ()]


@pytest.mark.parametrize("first", ["sep=;\r\n", "SEP=;\n", ""])
def test_excel_names_its_separator(tmp_path, first):
    file = tmp_path / "a.csv"
    file.write_bytes((first + "question;steps;answer\r\nq, r;a;1\r\n").encode("utf-8-sig"))
    (problem,) = read_problems(file)
    assert (problem.question, problem.steps, problem.answer) == ("q, r", ("a",), "1")


@pytest.mark.parametrize(
    "proxies, is_known, is_offline", [({}, False, True), ({}, True, False), ({"https": "p"}, False, False)]
)
def test_without_a_network_the_hub_is_not_asked(monkeypatch, proxies, is_known, is_offline):
    def resolve(*_):
        if not is_known:
            raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("coconut_ds.data.forms.getproxies", lambda: proxies)
    monkeypatch.setattr("coconut_ds.data.forms.socket.getaddrinfo", resolve)
    use_cache_without_network.__wrapped__()
    assert constants.HF_HUB_OFFLINE is is_offline
