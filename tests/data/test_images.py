import io
import pickle

import numpy as np
import pytest
from PIL import Image

from rayltr.data.images import THREADED, Files, Flat, Lazy, decode, decode_all, digests, shape_of
from tests.data.image_files import noise, png


def encoded(image: Image.Image, kind: str = "PNG", **keywords) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **keywords)
    return buffer.getvalue()


def test_png_comes_back_pixel_for_pixel():
    pixels = noise((5, 7, 3))
    np.testing.assert_array_equal(decode(png(pixels)), pixels)


def test_grey_palette_alpha_and_bits_become_rgb():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    expected = np.repeat(grey[..., None], 3, axis=2)
    alpha = np.dstack([expected, 255 - grey])
    images = [
        Image.fromarray(grey),
        Image.fromarray(grey).convert("P"),
        Image.fromarray(alpha),
        Image.fromarray(np.dstack([grey, 255 - grey])),
        Image.fromarray(grey.astype(np.uint16) * 257),
    ]
    assert [image.mode for image in images] == ["L", "P", "RGBA", "LA", "I;16"]
    for image in images:
        np.testing.assert_array_equal(decode(encoded(image)), expected)
    black_and_white = decode(encoded(Image.fromarray(grey > 100)))
    np.testing.assert_array_equal(black_and_white, np.where(expected > 100, 255, 0))


def test_a_wide_image_is_resized_and_cut_in_the_middle():
    wide = noise((20, 60, 3))
    whole = np.asarray(Image.fromarray(wide).resize((30, 10), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode(png(wide), 10), whole[:, 10:20])
    np.testing.assert_array_equal(decode(png(wide), 20), wide[:, 20:40])
    np.testing.assert_array_equal(decode(png(wide.transpose(1, 0, 2)), 20), wide.transpose(1, 0, 2)[20:40])


def test_resizing_is_antialiased():
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[::2] = 255
    assert abs(decode(png(lines), 16).astype(int) - 128).max() < 20


def test_a_large_jpeg_is_close_to_a_resize_of_all_its_pixels():
    smooth = Image.fromarray(noise((8, 8, 3))).resize((400, 400), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC))
    assert abs(decode(data, 32).astype(int) - whole).mean() < 2


def test_small_images_are_enlarged():
    assert decode(png(noise((4, 6, 3))), 9).shape == (9, 9, 3)


def test_decode_reads_paths(tmp_path):
    pixels = noise((3, 3, 3))
    (tmp_path / "a.png").write_bytes(png(pixels))
    np.testing.assert_array_equal(decode(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("side", [4, 200])
def test_many_decode_in_order_whether_by_threads_or_not(side):
    images = [noise((side, side, 3), seed) for seed in range(7)]
    data = [png(image) for image in images]
    assert (len(data[0]) > THREADED) == (side == 200)
    data[3] = data[3][:50]
    found = decode_all(data)
    assert found[3] is None
    for position in (0, 1, 2, 4, 5, 6):
        np.testing.assert_array_equal(found[position], images[position])


@pytest.mark.parametrize("broken", [b"", b"not an image", png(noise((9, 9, 3)))[:80], png(noise((9, 9, 3)))[:20]])
def test_what_cannot_be_read_is_none(broken):
    assert decode_all([broken]) == [None]
    assert decode_all([]) == []


def test_shape_is_height_and_width():
    assert shape_of(png(noise((3, 5, 3)))) == (3, 5)
    assert shape_of(b"nothing") is None


def test_digests_tell_pixels_and_shapes_apart():
    images = noise((4, 2, 8, 3))
    images[3] = images[0]
    found = digests(images)
    assert found.shape == (4, 16) and found.dtype == np.uint8
    assert len({bytes(one) for one in found}) == 3
    assert (digests(images.reshape(4, 4, 4, 3)) != found).any(axis=1).all()


def test_lazy_images_name_a_file_that_vanished(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(noise((2, 2, 3))))
    lazy = Lazy(Files([str(path)]), None, (2, 2))
    assert lazy.take(np.array([0, 0])).shape == (2, 2, 2, 3)
    path.unlink()
    with pytest.raises(ValueError, match="a.png cannot be read as an image any more"):
        lazy.take(np.array([0]))


def test_flat_gives_every_image_its_bytes():
    contents = [b"one", b"", b"three", b"4"]
    flat = Flat(np.frombuffer(b"".join(contents), np.uint8), np.cumsum([len(content) for content in contents]))
    assert flat.read(np.array([2, 0, 1, 3, 2])) == [b"three", b"one", b"", b"4", b"three"]
    assert pickle.loads(pickle.dumps(flat)).read(np.arange(4)) == contents


def test_a_mapped_file_is_mapped_again_by_another_process(tmp_path):
    np.save(tmp_path / "encoded.npy", noise((10_000,)))
    flat = Flat(np.load(tmp_path / "encoded.npy", mmap_mode="r"), np.array([4_000, 10_000]))
    sent = pickle.dumps(flat)
    assert len(sent) < 1_000
    assert pickle.loads(sent).read(np.array([1])) == flat.read(np.array([1]))
