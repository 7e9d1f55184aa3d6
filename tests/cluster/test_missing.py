"""A machine without SLURM: the tests that need it say what is missing and which command brings it."""

import two_nodes


def test_a_machine_without_slurm_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(two_nodes, "SEARCH", str(tmp_path))
    message = two_nodes.missing()
    assert "munged" in message and "slurmctld" in message
    assert message.endswith("apt-get install -y --no-install-recommends munge slurm-wlm")


def test_only_what_is_missing_is_named(monkeypatch, tmp_path):
    for name, package in two_nodes.PROGRAMS.items():
        if package == "slurm-wlm":
            (tmp_path / name).touch(0o755)
    monkeypatch.setattr(two_nodes, "SEARCH", str(tmp_path))
    message = two_nodes.missing()
    assert message.startswith("no munged on this machine") and message.endswith(" munge")
