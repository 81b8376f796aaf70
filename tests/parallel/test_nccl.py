"""The settings of NCCL's watchdog."""

from __future__ import annotations

from pathlib import Path

from gpt_dist.parallel.nccl import RECORDER, SETTINGS, set_nccl


def test_what_the_user_sets_stays() -> None:
    environment = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "60"}
    set_nccl(environment)
    assert environment == SETTINGS | {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "60"}


def test_the_flight_recorder_is_a_switch(tmp_path: Path) -> None:
    environment = {RECORDER: str(tmp_path / "flight")}
    set_nccl(environment)
    assert (tmp_path / "flight").is_dir()
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(environment["TORCH_FR_BUFFER_SIZE"]) > 0
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "flight" / "rank_")
    assert set(SETTINGS) < set(environment)
