"""How many processes a launcher's command line asks for."""

import pytest

from dalle.training.engines.launching import asked_processes


@pytest.mark.parametrize("command, asked", [
    (["accelerate", "launch", "--num_processes", "2", "train.py"], 2),
    (["accelerate", "launch", "--num-processes", "4", "train.py"], 4),
    (["accelerate", "launch", "--num_processes=3", "train.py"], 3),
    (["accelerate", "launch", "train.py"], None),
    (["accelerate", "launch", "--num_processes"], None),
])
def test_the_number_is_read_from_the_command_line(command, asked):
    assert asked_processes(command) == asked
