import numpy as np
import pytest

from captioning.attention.maps import peak_over_mean, scale_light, upsample


@pytest.mark.parametrize("size", [(640, 480), (480, 640)])
def test_the_light_falls_where_the_weight_is(size):
    weights = np.zeros(64)
    weights[8 * 1 + 6] = 1.0  # second row, seventh column
    light = upsample(weights, size)
    width, height = size
    assert light.shape == (height, width)
    assert 0.9 < light.max() <= 1.0
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert abs(row / height - 1.5 / 8) < 0.03
    assert abs(column / width - 6.5 / 8) < 0.03
    along = light[row]  # smooth: no steps as nearest-neighbour would give
    assert np.abs(np.diff(along)).max() < 0.05


@pytest.mark.parametrize("border", ["edge", "constant"])
def test_no_light_is_above_the_largest_weight_or_below_zero(border):
    weights = np.random.default_rng(0).dirichlet(np.full(64, 0.1))
    light = upsample(weights, (300, 200), border)
    assert light.dtype == np.float32
    assert light.min() == 0
    assert 0.8 * weights.max() < light.max() <= np.float32(weights.max())
    assert not upsample(np.zeros(64), (30, 20), border).any()


@pytest.mark.parametrize(("border", "peak", "at_the_edge"), [("edge", 6, 0.99), ("constant", 19, 0.58)])
def test_what_is_around_the_grid_decides_how_near_to_the_edge_a_peak_is(border, peak, at_the_edge):
    weights = np.zeros(64)
    weights[8 * 3] = 1.0  # fourth row, first column; a location is 40 pixels wide
    across = upsample(weights, (320, 240), border).max(axis=0)
    assert across[peak] == pytest.approx(across.max(), abs=0.01)
    assert across[0] / across.max() == pytest.approx(at_the_edge, abs=0.03)


def test_equal_weights_are_level_up_to_the_edge():
    np.testing.assert_allclose(upsample(np.full(64, 1 / 64), (320, 240)), 1 / 64, rtol=1e-6)
    assert upsample(np.full(16, 1 / 16), (40, 30)).shape == (30, 40)  # of another grid


def test_light_goes_from_the_least_to_the_most_of_a_caption():
    maps = np.full((2, 64), 1 / 64)
    maps[1, 5] += 0.5
    light = scale_light(maps)
    assert light.shape == (2, 64)
    assert (light[0] == 0).all()  # a word at nothing in particular, beside one that points
    assert light[1, 5] == 1
    maps[0, 3] += 0.125  # a quarter of the most
    assert scale_light(maps)[0, 3] == pytest.approx(0.5)


def test_a_caption_of_level_maps_gets_level_light():
    assert (scale_light(np.full((3, 64), 1 / 64)) == 0.5).all()
    assert scale_light(np.zeros((0, 64))).shape == (0, 64)


def test_a_peak_is_told_in_multiples_of_a_level_map():
    assert peak_over_mean(np.full(64, 1 / 64)) == pytest.approx(1)
    assert peak_over_mean(np.eye(64)[3]) == pytest.approx(64)
