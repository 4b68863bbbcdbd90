import pytest

from support.forecast import Forecast, _in_words


def forecast_of(total, batches, capsys, seconds=1.0):
    """What is said of a job whose batches of 10 images take so long."""
    times = iter(seconds * n for n in range(1000))
    forecast = Forecast("the features", total, "images", lambda: next(times))
    for _ in range(batches):
        forecast.add(10)
    return capsys.readouterr().out


def test_it_is_said_once_from_the_speed_behind_the_first_batch(capsys):
    said = forecast_of(1000, 50, capsys)
    # The first batch is not measured. After six in all there are 940 images left, at 10 a second.
    assert said == "the features will take about 2 min more, at 10 images/s\n"


def test_nothing_is_said_too_early_or_of_short_jobs(capsys):
    assert forecast_of(1000, 5, capsys) == ""
    assert forecast_of(200, 20, capsys) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(21, "21 s"), (89.6, "90 s"), (100, "2 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_lengths_of_time(seconds, words):
    assert _in_words(seconds) == words
