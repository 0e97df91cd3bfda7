"""Remote files are downloaded completely, once, and into their own folder; failures give a one-sentence error."""

import errno
import itertools
from pathlib import Path

import pytest
import stores
from fsspec.registry import known_implementations

from spap_jax.errors import UserError, first_line
from spap_jax.storage.files import Folder, Span, fetch_file, read_note
from spap_jax.storage.location import hub_id, is_address, public_name


def downloads(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "downloads"
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert is_address("gs://bucket/x")
    assert is_address("hf://owner/name")
    assert not any(map(is_address, ("owner/name", "c4:gs://bucket/x", "./gs:/x", Path("gs://bucket"), "://x")))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id("hf://owner/name/") == hub_id("owner/name") == "owner/name"
    paths = ("gs://owner/name", "here/name", "./owner/name", "name", "a/b/c", Path("owner/name"))
    assert not any(hub_id(name) for name in paths)


def test_a_file_is_downloaded_again_only_when_it_has_changed(store: type[stores.Frail]):
    Folder("frail://bucket/data").write("a.txt", b"one")
    first = fetch_file("frail://bucket/data/a.txt")
    assert (first.name, first.read_bytes()) == ("a.txt", b"one")
    assert fetch_file("frail://bucket/data/a.txt") == first
    assert [what for what, _ in store.done] == ["put", "get"]
    Folder("frail://bucket/data").write("a.txt", b"two")
    assert fetch_file("frail://bucket/data/a.txt").read_bytes() == b"two"
    assert first.read_bytes() == b"one"  # a run that is reading it still can


def test_an_address_that_leads_to_a_new_one_each_time_is_downloaded_once(
    store: type[stores.Frail], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Folder("frail://bucket/data").write("a.txt", b"one")
    info, times = store.info, itertools.count()
    monkeypatch.setattr(store, "info", lambda *path, **how: info(*path, **how) | {"url": f"disk/{next(times)}"})
    assert len({fetch_file("frail://bucket/data/a.txt") for _ in range(2)}) == 1
    assert next(times) > 1
    assert sum(name.endswith("a.txt") for name in downloads(tmp_path)) == 1


def test_of_a_folder_what_is_wanted(store: type[stores.Frail]):
    place = Folder("frail://bucket/in/")
    for name in ("a", "deep/b", "c"):
        place.write(name, name.encode())
    place = Folder("frail://bucket/in")
    assert sorted(place.files()) == ["a", "c", "deep/b"]
    local = place.fetch({name: about for name, about in place.files().items() if name != "c"})
    assert {str(file.relative_to(local)): file.read_text() for file in local.rglob("*") if file.is_file()} == {
        "a": "a",
        "deep/b": "deep/b",
    }
    assert place.read("c") == b"c"
    assert place.read("d") is None


def test_a_download_that_fails_leaves_nothing(store: type[stores.Frail], tmp_path: Path):
    place = Folder("frail://bucket/in")
    for name in ("a", "b"):
        place.write(name, b"content")
    store.broken = "get /bucket/in/b"
    with pytest.raises(
        UserError, match=r"frail://bucket/in cannot be read \(the store is on fire\): check the address"
    ):
        place.fetch(place.files())
    assert not [*(tmp_path / "cache" / "downloads").iterdir()]
    store.broken, store.short = "", True
    with pytest.raises(UserError, match="frail://bucket/in/a was not downloaded completely: try again"):
        place.fetch(place.files())
    assert not [*(tmp_path / "cache" / "downloads").iterdir()]
    store.short = False
    place.fetch(place.files())
    assert [Path(name).name for name in downloads(tmp_path)] == ["a", "b", "note"]


def test_a_download_of_which_a_part_is_gone_is_made_again(store: type[stores.Frail]):
    """As where a cluster removes old files from its scratch disk."""
    place = Folder("frail://bucket/in")
    for name in ("a", "b"):
        place.write(name, b"content")
    found = place.fetch(place.files(), "x")
    (found / "b").unlink()
    assert place.fetch(place.files(), "x") == found
    assert [(found / name).read_bytes() for name in ("a", "b")] == [b"content", b"content"]


def test_a_disk_that_fills_up_during_a_download(store: type[stores.Frail], monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Folder("frail://bucket/in").write("a", b"content")
    monkeypatch.setattr(store, "get_file", full)
    with pytest.raises(UserError, match=r"the disk filled up while frail://bucket/in was read: .* in SPAP_CACHE"):
        fetch_file("frail://bucket/in/a")


def test_what_cannot_be_listed_is_not_empty(store: type[stores.Frail], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store, "ls", refused)
    with pytest.raises(UserError, match=r"frail://bucket/in cannot be read .*Permission denied"):
        Folder("frail://bucket/in").files()

    (tmp_path / "a").write_text("a letter")
    place = Folder(f"file://{tmp_path}")
    assert [*place.files()] == ["a"]
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.ls", refused)
    with pytest.raises(UserError, match=r"cannot be read .*Permission denied"):
        place.files()


def test_a_password_is_neither_said_nor_readable_by_others(store: type[stores.Frail], tmp_path: Path):
    place = Folder("frail://me:secret@bucket/in")
    place.write("a", b"content")
    store.broken = "get"
    with pytest.raises(UserError) as raised:
        place.fetch(place.files())
    assert str(raised.value).startswith("frail://bucket/in cannot be read")
    store.broken = ""
    made = place.fetch(place.files(), "frail://me:secret@bucket/in")
    assert made.parent.stat().st_mode & 0o077 == 0
    assert str(UserError("frail://me:secret@bucket/in and az://container@account/x")) == (
        "frail://bucket/in and az://container@account/x"
    )
    assert first_line(OSError("https://me:secret@host/a timed out")) == "https://host/a timed out"
    assert public_name("https://me:secret@host") == "host"


def test_a_disk_without_room(store: type[stores.Frail], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Folder("frail://bucket/in").write("a", b"content")
    place = Folder("frail://bucket/in")
    with pytest.raises(UserError, match=r"1e.06 TB"):
        place.fetch({"a": place.about("a") | {"size": 10**18}})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPAP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="name another in SPAP_CACHE"):
        fetch_file("frail://bucket/in/a")


def test_a_name_that_leads_out_of_the_folder(store: type[stores.Frail], tmp_path: Path):
    place = Folder("frail://bucket/in")
    place.write("a", b"content")
    store.store["/bucket/in/../../evil"] = store.store["/bucket/in/a"]
    with pytest.raises(UserError, match=r"\.\./\.\./evil, whose name leads out of its folder"):
        place.fetch(place.files())
    assert not downloads(tmp_path)


def test_ranges_are_asked_for_again_a_few_times(store: type[stores.Frail]):
    place = Folder("frail://bucket/in")
    place.write("a", b"0123456789")
    place.write("b", b"abcdef")
    spans = [Span("a", 2, 5), Span("b", 0, 1), Span("a", 2, 5), Span("a", 9, 10)]
    assert place.ranges(spans) == [b"234", b"a", b"234", b"9"]
    assert place.ranges([]) == []
    store.asked.clear()
    store.failures = 2
    assert place.ranges(spans[:2]) == [b"234", b"a"]
    assert store.asked == [("/bucket/in/a", 2, 5), ("/bucket/in/b", 0, 1)]  # both failed once
    store.failures = 3
    with pytest.raises(
        UserError, match=r"^frail://bucket/in/a cannot be read \(the store is on fire\): check the addr"
    ):
        place.ranges(spans[:1])
    with pytest.raises(UserError, match=r"frail://bucket/in/b cannot be read \(2 of 4 bytes arrived\)"):
        place.ranges([Span("b", 4, 8)])
    with pytest.raises(UserError, match=r"frail://bucket/in/c cannot be read \(it is not there\)"):
        place.ranges([Span("c", 4, 8)])


def test_a_note_is_none_of_the_files_of_a_store(store: type[stores.Frail], tmp_path: Path):
    place = Folder("frail://bucket/in")
    for name in ("a", "note", "spap_weights.json"):
        place.write(name, b"from anywhere")
    one, other = (place.fetch(place.files(), text) for text in ("x", "y"))
    assert [read_note(folder) for folder in (one, other)] == ["x", "y"]
    assert read_note(place.fetch(place.files())) is None
    (tmp_path / "files").mkdir()
    (tmp_path / "note").write_text("from anywhere")
    assert read_note(tmp_path / "files") is None


def test_what_is_not_there(store: type[stores.Frail]):
    with pytest.raises(UserError, match=r"^frail://bucket/no\.txt cannot be read \(it is not there\)"):
        fetch_file("frail://bucket/no.txt")
    assert Folder("frail://bucket/none").files() == {}
    Folder("frail://bucket/none").clear()


def test_what_reads_such_addresses_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    lacking = {"class": "no_such_package.Store", "err": "Please install no_such_package to access it"}
    monkeypatch.setitem(known_implementations, "lacking", lacking)
    with pytest.raises(UserError, match="no_such_package"):
        Folder("lacking://bucket/in")
    with pytest.raises(UserError, match=r"strange://x cannot be opened \(Protocol not known: strange\)"):
        Folder("strange://x")
