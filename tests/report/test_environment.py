from __future__ import annotations

import platform
import subprocess

import pytest
import torch

from zoo.report import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "--quiet")
    package = tmp_path / "package"
    package.mkdir()
    (package / "module.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a name that must not replace the digits")
    return package


def test_versions_are_texts_for_every_program():
    found = environment.versions()
    assert list(found) == ["python", "torch", "lightning", "timm", "zoo"]
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__.split("+")[0]


def test_a_program_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(environment._DISTRIBUTIONS, "timm", "no-such-distribution-anywhere")
    assert environment.versions()["timm"] == "not installed"


def test_device_describes_the_processor():
    found = environment.device()
    assert found == {
        "type": "cpu",
        "name": environment.processor(),
        "threads": torch.get_num_threads(),
    }


def test_device_describes_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"model {device.index}")
    found = environment.device("cuda:1")
    assert (found["type"], found["name"]) == ("cuda", "model 1")


def test_the_processor_is_read_from_cpuinfo(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Fast  CPU @ 2GHz \nmodel name\t: Other\n")
    assert environment.processor(path) == "Fast CPU @ 2GHz"


@pytest.mark.parametrize("text", [None, "processor: 0\nmodel name\t:\nflags\t: fpu\n"])
def test_without_a_model_the_platform_is_asked(tmp_path, monkeypatch, text):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert environment.processor(tmp_path / "cpuinfo") == "riscv64"


def test_commit_is_the_full_hash_and_marks_changes(checkout):
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], check=True, capture_output=True
    )
    digits = head.stdout.decode().strip()
    assert environment.commit(checkout) == digits
    (checkout / "untracked.txt").touch()
    assert environment.commit(checkout) == digits
    (checkout / "module.py").write_text("x = 2\n")
    assert environment.commit(checkout) == f"{digits}-dirty"


def test_commit_looks_past_the_variables_of_a_hook(checkout, monkeypatch, tmp_path):
    expected = environment.commit(checkout)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert expected is not None
    assert environment.commit(checkout) == expected


def test_a_package_inside_a_foreign_checkout_has_no_commit(checkout):
    installed = checkout.parent / "site-packages" / "zoo"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert environment.commit(installed) is None


def test_outside_a_checkout_there_is_no_commit(tmp_path):
    assert environment.commit(tmp_path) is None
    assert environment.commit(tmp_path / "gone") is None


def test_without_git_there_is_no_commit(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert environment.commit(checkout) is None
