"""Remote files are downloaded completely, once, and into their own folder; failures give a one-sentence error."""

from pathlib import Path

import pytest
import stores
from fsspec.registry import known_implementations

from spap_jax.errors import UserError
from spap_jax.remote import Folder, fetch_file, fetch_folder, hub_id, is_address, working_folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[stores.Frail]:
    monkeypatch.setenv("SPAP_CACHE", str(tmp_path / "cache"))
    return stores.begin()


def downloads(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "downloads"
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_names():
    assert is_address("gs://bucket/x")
    assert is_address("hf://owner/name")
    assert not any(map(is_address, ("owner/name", "c4:gs://bucket/x", "./gs:/x", Path("gs://bucket"), "://x")))
    assert hub_id("hf://owner/name/") == "owner/name"
    assert hub_id("gs://owner/name") is None


def test_where_things_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPAP_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    one = working_folder("gs://bucket/a/out/")
    assert one.name == "out"
    assert one.is_relative_to("/home/somebody/.cache/spap")
    assert one.parent != working_folder("gs://bucket/b/out").parent
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert working_folder("gs://bucket/out").is_relative_to("/elsewhere/spap")
    monkeypatch.setenv("SPAP_CACHE", "/disk")
    assert working_folder("gs://bucket/out").is_relative_to("/disk/outputs")


def test_a_file_is_downloaded_again_only_when_it_has_changed(store: type[stores.Frail]):
    Folder("frail://bucket/data").write("a.txt", b"one")
    first = fetch_file("frail://bucket/data/a.txt")
    assert (first.name, first.read_bytes()) == ("a.txt", b"one")
    assert fetch_file("frail://bucket/data/a.txt") == first
    assert [what for what, _ in store.done] == ["put", "get"]
    Folder("frail://bucket/data").write("a.txt", b"two")
    assert fetch_file("frail://bucket/data/a.txt").read_bytes() == b"two"
    assert first.read_bytes() == b"one"  # a run that is reading it still can


def test_of_a_folder_what_is_wanted(store: type[stores.Frail]):
    place = Folder("frail://bucket/in/")
    for name in ("a", "deep/b", "c"):
        place.write(name, name.encode())
    place = Folder("frail://bucket/in")
    assert sorted(place.files()) == ["a", "c", "deep/b"]
    local = fetch_folder("frail://bucket/in", lambda names: [name for name in names if name != "c"])
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
        fetch_folder("frail://bucket/in", sorted)
    assert not [*(tmp_path / "cache" / "downloads").iterdir()]
    store.broken, store.short = "", True
    with pytest.raises(UserError, match="frail://bucket/in/a was not downloaded completely: try again"):
        fetch_folder("frail://bucket/in", sorted)
    assert not [*(tmp_path / "cache" / "downloads").iterdir()]
    store.short = False
    fetch_folder("frail://bucket/in", sorted)
    assert [Path(name).name for name in downloads(tmp_path)] == ["a", "b"]


def test_a_disk_without_room(store: type[stores.Frail], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Folder("frail://bucket/in").write("a", b"content")
    place = Folder("frail://bucket/in")
    with pytest.raises(UserError, match=r"holds 1e.06 TB and the disk of .* free: free some space, or name a folder"):
        place.fetch({"a": place.about("a") | {"size": 10**18}})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPAP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="name another in SPAP_CACHE"):
        fetch_file("frail://bucket/in/a")


def test_a_name_that_leads_out_of_the_folder(store: type[stores.Frail], tmp_path: Path):
    Folder("frail://bucket/in").write("a", b"content")
    store.store["/bucket/in/../../evil"] = store.store["/bucket/in/a"]
    with pytest.raises(UserError, match=r"\.\./\.\./evil, whose name leads out of its folder"):
        fetch_folder("frail://bucket/in", sorted)
    assert not downloads(tmp_path)


def test_what_is_not_there(store: type[stores.Frail]):
    with pytest.raises(UserError, match=r"^frail://bucket/no\.txt cannot be read \(it is not there\)"):
        fetch_file("frail://bucket/no.txt")
    assert Folder("frail://bucket/none").files() == {}
    Folder("frail://bucket/none").clear()


def test_what_reads_such_addresses_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    lacking = {"class": "no_such_package.Store", "err": "Please install no_such_package to access it"}
    monkeypatch.setitem(known_implementations, "lacking", lacking)
    with pytest.raises(UserError) as raised:
        Folder("lacking://bucket/in")
    assert str(raised.value) == (
        "lacking://bucket/in needs a package that is not installed (Please install no_such_package to access it): "
        "pip install 'spap-jax[remote]' installs those for gs:// and s3://."
    )
    with pytest.raises(UserError, match=r"strange://x cannot be opened \(Protocol not known: strange\)"):
        Folder("strange://x")
