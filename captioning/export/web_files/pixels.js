"use strict";

// An image as the network takes it: a square of whole numbers, squeezed as Pillow does it for the scripts.

const STRIP_BYTES = 8_000_000; // of an image's pixels, read at a time: a phone's canvas holds no large image
const FRACTION_BITS = 22; // of Pillow's weights, which are whole numbers
const JPEG_RATIOS = [8, 4, 2]; // a large JPEG file is decoded at a fraction of its size by the scripts

// The weights of Pillow's bilinear filter from `size` pixels to `side`: for each of these {first pixel, weights}.
function bilinearTaps(size, side) {
  const scale = size / side;
  const support = Math.max(scale, 1); // pixels on each side that count
  return Array.from({ length: side }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), size);
    const taps = Array.from({ length: end - first }, (_, i) =>
      Math.max(1 - Math.abs((first + i - centre + 0.5) * (1 / support)), 0),
    );
    const sum = taps.reduce((total, tap) => total + tap, 0);
    return { first, weights: taps.map((tap) => Math.round((tap / sum) * 2 ** FRACTION_BITS)) };
  });
}

// At which fraction the scripts decode a JPEG file of this size: 1, or 1/2, 1/4 or 1/8 as 2, 4 or 8.
function jpegRatio(width, height, side) {
  const excess = Math.floor(Math.min(width, height) / side);
  return JPEG_RATIOS.find((ratio) => ratio <= excess) ?? 1;
}

// The means of boxes of `ratio` x `ratio` pixels, which is what decoding a JPEG file at a fraction comes to.
// RGBA of `rows` rows -> RGB of rows / ratio rows, rounded up, as the last boxes may be smaller.
function averageBoxes(pixels, width, rows, ratio) {
  const columns = Math.ceil(width / ratio);
  const means = new Uint8Array(Math.ceil(rows / ratio) * columns * 3);
  for (let y = 0, out = 0; y < rows; y += ratio)
    for (let x = 0; x < width; x += ratio) {
      const [bottom, right] = [Math.min(y + ratio, rows), Math.min(x + ratio, width)];
      const sums = [0, 0, 0];
      for (let row = y; row < bottom; row++)
        for (let i = 4 * (row * width + x); i < 4 * (row * width + right); i += 4)
          for (let channel = 0; channel < 3; channel++) sums[channel] += pixels[i + channel];
      for (const sum of sums) means[out++] = Math.round(sum / ((bottom - y) * (right - x)));
    }
  return means;
}

// One output number: pixels `step` apart in `from`, weighted.
function weigh(from, start, step, weights) {
  let sum = 2 ** (FRACTION_BITS - 1); // so that the shift rounds
  for (let i = 0; i < weights.length; i++) sum += from[start + i * step] * weights[i];
  return Math.min(Math.max(sum >> FRACTION_BITS, 0), 255);
}

// Squeeze an image to side x side.
// readRows: function of (first row, count) -> their RGBA; ratio: as from jpegRatio, or 1. -> Uint8Array (side, side, 3)
function squeezeImage(readRows, width, height, ratio, side) {
  const [columns, rows] = [Math.ceil(width / ratio), Math.ceil(height / ratio)];
  const across = bilinearTaps(columns, side);
  const narrow = new Uint8Array(rows * side * 3);
  const strip = ratio * Math.max(Math.floor(STRIP_BYTES / (4 * width * ratio)), 1); // rows
  for (let top = 0, out = 0; top < height; top += strip) {
    const count = Math.min(strip, height - top);
    const pixels = averageBoxes(readRows(top, count), width, count, ratio);
    for (let start = 0; start < pixels.length; start += 3 * columns)
      for (const { first, weights } of across)
        for (let channel = 0; channel < 3; channel++)
          narrow[out++] = weigh(pixels, start + 3 * first + channel, 3, weights);
  }
  const square = new Uint8Array(side * side * 3);
  let out = 0;
  for (const { first, weights } of bilinearTaps(rows, side))
    for (let i = 0; i < 3 * side; i++) square[out++] = weigh(narrow, 3 * side * first + i, 3 * side, weights);
  return square;
}
