"""`benchmarks.layer_overhead`: every layer of every step is run."""

from benchmarks.layer_overhead import make_layers, time_steps


def test_rows_are_steps_and_columns_layers(model_path: str) -> None:
    seconds = time_steps(make_layers(model_path, 3), 20)
    assert seconds.shape == (18, 3)
    assert (seconds > 0).all(axis=None)
