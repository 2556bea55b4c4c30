"""Writing: only an artefact of the same kind is ever replaced, and what is there is whole at any moment."""

from __future__ import annotations

import errno
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

import command_line
import commandv as cv
import tiny
from command_line import fails
from commandv.errors import FormatError, InputError, StorageError
from commandv.interop.control_vectors import write_control_vector
from commandv.interop.sae import SAE, save_sae
from commandv.positions import EVERYWHERE
from commandv.storage.directories import kept, read_artefact
from commandv.storage.files import LOCK, cache_dir, write_text, writing
from commandv.storage.foreign import BUILD, new_directory
from commandv.storage.kinds import ADAPTER
from made_up import same_tensors
from stored import data_file

PROMPTS = ["one tea", "two teas"]
run = command_line.run


@pytest.fixture(scope="module")
def made():
    lm = tiny.tiny_lm()
    return lm, tiny.random_adapter(lm, (0, 1), rank=2), tiny.random_adapter(lm, (2,), rank=1, seed=5)


def contents(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


def same(one: cv.Adapter, two: cv.Adapter) -> bool:
    return one.layers == two.layers and all(
        torch.equal(a.write, b.write) and torch.equal(a.read, b.read) and torch.equal(a.bias, b.bias)
        for layer in one.layers
        for a, b in zip(one.interventions[layer], two.interventions[layer], strict=True)
    )


# -- what is in the way -----------------------------------------------------------------------------------------------


def writers(lm, adapter):
    sae = SAE(
        w_enc=torch.randn(32, 40), b_enc=torch.zeros(40), w_dec=torch.randn(40, 32), b_dec=torch.zeros(32),
        layer=1, architecture="standard",
    )  # fmt: skip
    return {
        "save": lambda path: cv.save(adapter, path),
        "profile": lambda path: cv.profile(lm, PROMPTS, cache=path, text=None),
        "save_profile": lambda path: cv.save_profile(cv.profile(lm, PROMPTS, cache=False, text=None), path),
        "sae": lambda path: save_sae(sae, path),
    }


@pytest.mark.parametrize("which", ["save", "profile", "save_profile", "sae"])
@pytest.mark.parametrize("holds", ["notes", "folder", "other kind", "part of a kind", "link", "file"])
def test_what_is_no_artefact_of_the_kind_is_refused_and_left_alone(which, holds, made, tmp_path):
    lm, adapter, _ = made
    target, write = tmp_path / "target", writers(lm, adapter)[which]
    if holds == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if holds == "notes":
        (target / "chapter1.tex").write_text("years of work")
    elif holds == "folder":
        (target / "sub").mkdir()
        (target / "sub" / "data.csv").write_text("1,2")
    elif holds == "other kind":
        writers(lm, adapter)["profile" if which == "save" else "save"](target)
    elif holds == "part of a kind":
        (target / "tensors.safetensors").write_text("no config beside it")
        (target / "keys.safetensors").write_text("no config beside it")
    elif holds == "link":
        (target / "elsewhere").symlink_to(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FormatError, match=r"target.*choose another place"):
        write(target)
    assert contents(tmp_path) == before


def test_the_lock_that_an_earlier_version_left_in_the_cache_is_in_nobodys_way(made, tmp_path):
    _, adapter, _ = made
    place = tmp_path / "cached"
    place.mkdir()
    (place / ".lock").touch()

    def make() -> cv.Adapter:
        cv.save(adapter, place)
        return cv.load_adapter(place)

    made_anew = kept(place, "config.json", lambda: cv.load_adapter(place), make, kind=ADAPTER)
    assert same_tensors(made_anew, adapter)
    assert not (place / ".lock").exists()


@pytest.mark.parametrize("which", ["save", "profile", "save_profile", "sae"])
@pytest.mark.parametrize("name", [".lock", ".build", ".moving", ".git"])
def test_hidden_files_of_the_user_are_files_too(which, name, made, tmp_path):
    lm, adapter, _ = made
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_text("")  # a lock of another program is as empty as one of ours
    with pytest.raises(FormatError, match=rf"\{name}"):
        writers(lm, adapter)[which](target)
    assert [one.name for one in target.iterdir()] == [name]


def test_a_directory_of_the_user_named_as_one_that_is_being_filled(tmp_path):
    (tmp_path / ".build" / "debug").mkdir(parents=True)
    with pytest.raises(FormatError, match=r"\.build"), new_directory(tmp_path, "last.json"):
        pytest.fail("it was taken for ours")
    assert (tmp_path / ".build" / "debug").is_dir()
    assert BUILD.startswith(".commandv")


@pytest.mark.parametrize("kind", ["text", "link", "directory"])
def test_what_lies_where_a_lock_would_be_and_is_none(kind, made, tmp_path):
    _, adapter, _ = made
    (tmp_path / "mine.txt").write_text("mine")
    lock = tmp_path / "a" / LOCK
    lock.parent.mkdir()
    if kind == "text":
        lock.write_text("mine")
    elif kind == "link":
        lock.symlink_to(tmp_path / "mine.txt")
    else:
        lock.mkdir()
    with pytest.raises(FormatError, match="not a lock of commandv"):
        cv.save(adapter, tmp_path / "a")
    assert [one.name for one in (tmp_path / "a").iterdir()] == [LOCK]
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("which", ["save", "profile"])
def test_an_own_artefact_with_a_file_of_the_user_in_it_is_not_replaced(which, made, tmp_path):
    lm, adapter, other = made
    writers(lm, adapter)[which](tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FormatError, match=r"notes\.txt"):
        writers(lm, other)[which](tmp_path)
    assert contents(tmp_path) == before


def test_a_damaged_artefact_is_not_replaced(made, tmp_path):
    _, adapter, other = made
    data_file(cv.save(adapter, tmp_path / "a")).unlink()
    with pytest.raises(FormatError, match=r"not a whole commandv-adapter.*delete the directory"):
        cv.save(other, tmp_path / "a")


def test_the_command_line_refuses_before_it_loads_a_model(tmp_path, run):
    (tmp_path / "notes.txt").write_text("mine")
    for words in (
        ["profile", "gemma-3-270m", "--out", str(tmp_path)],
        ["train", "gemma-3-270m", "builtin:numbered-list", "-o", str(tmp_path)],
        ["steer", "gemma-3-270m", "builtin:sentiment", "-o", str(tmp_path)],
        ["paste", "builtin:pirate@gemma-3-270m", "anna/donor", "anna/recipient", "-o", str(tmp_path)],
        ["export", "builtin:pirate@gemma-3-270m", str(tmp_path)],
    ):
        fails(run(*words), "choose another place")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_files_of_others_are_not_overwritten(made, tmp_path):
    lm, _, _ = made
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    vector = cv.Adapter({1: cv.steering_vector(torch.ones(32))}, lm.ref, "v").at(EVERYWHERE)
    examples = cv.load_prompts("builtin:numbered-list")[:8]
    quick = cv.TrainSettings(epochs=1, max_response=4)
    with pytest.raises(FormatError, match="no control vector"):
        write_control_vector(vector, notes)
    with pytest.raises(FormatError, match="not a checkpoint"):
        cv.train(lm, examples, cv.DiReFT(rank=1), quick, checkpoint=notes)
    for write in (
        lambda: write_control_vector(vector, tmp_path),
        lambda: cv.train(lm, examples, cv.DiReFT(rank=1), quick, checkpoint=tmp_path),
    ):
        with pytest.raises(FormatError, match=r"choose another place|expected a file"):
            write()
    assert contents(tmp_path) == {"notes.txt": b"mine"}


# -- places -----------------------------------------------------------------------------------------------------------


def test_the_current_directory_a_link_and_a_link_to_nothing(made, tmp_path, monkeypatch):
    lm, adapter, other = made
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for one in (adapter, other):
        cv.save(one, ".")
        assert same(cv.load_adapter("."), one)
        assert same(cv.load_adapter(work), one)
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(work)
    dangling.symlink_to(tmp_path / "new")
    cv.save(adapter, link)
    cv.save(adapter, dangling)
    assert link.is_symlink()
    assert dangling.is_symlink()
    for place in (work, tmp_path / "new"):
        assert same(cv.load_adapter(place), adapter)
        assert sorted(one.name for one in place.iterdir()) == ["config.json", data_file(place).name]
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert len(cv.profile(lm, PROMPTS, cache=Path("."), text=None)) == 2
    assert len(cv.load_profile(here)) == 2


@pytest.mark.parametrize("place", ["", "a\0b", "caf\udce9"])  # the last in Latin-1, which safetensors cannot open
def test_paths_that_are_none(place, made):
    with pytest.raises(InputError, match=r"expected a directory|NUL|no UTF-8"):
        cv.save(made[1], place)


def test_long_names(made, tmp_path):
    cv.save(made[1], tmp_path / ("n" * 250))
    write_text(tmp_path / ("m" * 250), "text")
    assert sorted(one.name[0] for one in tmp_path.iterdir()) == ["m", "n"]
    with pytest.raises(StorageError, match="cannot write"):
        cv.save(made[1], tmp_path / ("n" * 300))


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


# -- leftovers --------------------------------------------------------------------------------------------------------


def test_what_a_killed_save_leaves_is_removed_by_the_next(made, tmp_path):
    _, adapter, other = made
    cv.save(adapter, tmp_path / "a")
    cv.save(other, tmp_path / "b")
    for left in (
        data_file(tmp_path / "b").name,
        ".config.json.0123abcd.tmp",
        ".tensors-0123456789ab.safetensors.00000000.tmp",
    ):
        for place in (tmp_path / "a", tmp_path / "first"):
            place.mkdir(exist_ok=True)
            (place / left).write_bytes(b"half")
    for place in (tmp_path / "a", tmp_path / "first"):
        (place / LOCK).touch()
    assert same(cv.load_adapter(tmp_path / "a"), adapter)
    for place in (tmp_path / "a", tmp_path / "first"):
        cv.save(adapter, place)
        assert sorted(one.name for one in place.iterdir()) == ["config.json", data_file(place).name]
        assert same(cv.load_adapter(place), adapter)


def test_what_a_killed_writer_of_a_file_leaves_is_removed_by_the_next(tmp_path):
    for left in (".report.md.0123abcd.tmp", ".other.md.0123abcd.tmp", ".report.md.notes.tmp"):
        (tmp_path / left).write_text("half")
    (tmp_path / f".report.md{LOCK}").touch()
    write_text(tmp_path / "report.md", "whole")
    assert set(contents(tmp_path)) == {"report.md", ".other.md.0123abcd.tmp", ".report.md.notes.tmp"}


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def half(file):
        file.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), writing(tmp_path / "sub" / "file") as temporary:
        half(temporary)
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "new", "last.json") as directory:
        half(directory / "file")
    assert contents(tmp_path) == {}
    assert not (tmp_path / "new").exists()


# -- several at once --------------------------------------------------------------------------------------------------


def test_two_savers_do_not_fail_each_other_and_readers_see_one_whole_adapter(made, tmp_path, monkeypatch):
    _, adapter, other = made
    target, problems, stop = cv.save(adapter, tmp_path / "a"), [], threading.Event()

    def save(one):
        for _ in range(25):
            cv.save(one, target)

    def load():
        while not stop.is_set():
            found = cv.load_adapter(target)
            assert same(found, adapter) or same(found, other)

    monkeypatch.setattr(threading, "excepthook", problems.append)
    savers = [threading.Thread(target=save, args=[one]) for one in (adapter, other)]
    reader = threading.Thread(target=load)
    for thread in (*savers, reader):
        thread.start()
    for thread in savers:
        thread.join()
    stop.set()
    reader.join()
    assert problems == []
    assert sorted(one.name for one in target.iterdir()) == ["config.json", data_file(target).name]


def test_another_process_waits_for_the_first(tmp_path):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_append, args=[tmp_path / "file", letter]) for letter in "ab"]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert (tmp_path / "file").read_text() in ("a" * 50, "b" * 50)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def _append(file, letter):
    for n in range(1, 51):
        write_text(file, letter * n)


def test_a_reader_that_missed_two_replacements_reads_again(tmp_path):
    """The second puts back what the reader had begun with, so that the configuration alone does not tell."""
    one, other = (tiny.random_adapter(tiny.tiny_lm(), (0, 1), rank=2, seed=seed) for seed in (1, 2))
    place = tmp_path / "adapter"
    cv.save(one, place)
    calls = []

    def build(_config, files):
        calls.append(files)
        if len(calls) == 1:
            cv.save(other, place)
            cv.save(one, place)
            raise FileNotFoundError(errno.ENOENT, "gone", str(next(iter(files.values()))))
        return "read"

    assert read_artefact(place, ADAPTER, build) == "read"
    assert len(calls) == 2


def test_a_cache_in_the_home_of_nobody(monkeypatch):
    monkeypatch.setenv("COMMANDV_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(InputError, match="COMMANDV_CACHE='~nobody-of-this-name/cache': no such user"):
        cache_dir()
