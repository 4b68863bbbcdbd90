
"use strict";

// Light on an image: from a map of attention to a canvas. It knows nothing of the page but the frame it is given.

const FADE = 180; // milliseconds from one word's light to the next
const OVERLAY_SIDE = 240; // pixels of an overlay's longer side; the browser scales it to the image
const HEAT_OPACITY = 0.75; // of the heat map at the slider's end: the image stays visible below it
const lessMotion = matchMedia("(prefers-reduced-motion: reduce)");

// matplotlib's "inferno" at 0, 1/8, ..., 1. It is perceptually ordered: more attention is always brighter.
const INFERNO = [
  [0, 0, 4], [31, 12, 72], [87, 16, 110], [138, 34, 106], [188, 55, 84], [227, 89, 51], [249, 142, 9], [249, 203, 53],
  [252, 255, 164],
];

// The weights of Pillow's bicubic filter (a = -0.5) from 8 cells to `size` pixels. The edge cells go on outside.
function bicubicTaps(size, cells) {
  const cubic = (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  };
  return Array.from({ length: size }, (_, pixel) => {
    const centre = ((pixel + 0.5) * cells) / size;
    const first = Math.floor(centre - 1.5);
    const taps = [0, 1, 2, 3].map((tap) => ({
      cell: Math.min(Math.max(first + tap, 0), cells - 1),
      weight: cubic(first + tap + 0.5 - centre),
    }));
    const sum = taps.reduce((total, tap) => total + tap.weight, 0);
    return taps.map(({ cell, weight }) => ({ cell, weight: weight / sum }));
  });
}

// A word's 64 weights, 0 to 255, as smooth light over the image, 0 to 1. As in the PNG figures.
function upsample(weights, width, height) {
  const cells = Math.sqrt(weights.length);
  const across = bicubicTaps(width, cells);
  const down = bicubicTaps(height, cells);
  const rows = new Float32Array(cells * width);
  for (let row = 0; row < cells; row++)
    for (let x = 0; x < width; x++)
      for (const { cell, weight } of across[x]) rows[row * width + x] += weight * weights[row * cells + cell];
  const light = new Float32Array(width * height);
  const most = Math.max(...weights);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      let value = 0;
      for (const { cell, weight } of down[y]) value += weight * rows[cell * width + x];
      light[y * width + x] = Math.min(Math.max(value, 0), most) / 255; // bicubic curves swing a little over and under
    }
  return light;
}

// 256 colours from the few of INFERNO
const heatColours = Array.from({ length: 256 }, (_, level) => {
  const place = (level / 255) * (INFERNO.length - 1);
  const below = Math.min(Math.floor(place), INFERNO.length - 2);
  return INFERNO[below].map((colour, i) => colour + (place - below) * (INFERNO[below + 1][i] - colour));
});

// A canvas over the image of a frame. It fades from what it shows to what it is to show.
// `look` is a function that returns {heat: boolean, darkness: 0 to 1}.
class Overlay {
  constructor(frame, look) {
    const [width, height] = sizeOf(frame.querySelector("img"));
    const scale = OVERLAY_SIDE / Math.max(width, height);
    this.frame = frame;
    this.look = look;
    this.canvas = document.createElement("canvas");
    this.canvas.width = Math.max(Math.round(width * scale), 8);
    this.canvas.height = Math.max(Math.round(height * scale), 8);
    this.canvas.setAttribute("aria-hidden", "true");
    this.context = this.canvas.getContext("2d");
    this.pixels = this.context.createImageData(this.canvas.width, this.canvas.height);
    this.now = { light: null, strength: 0 }; // strength: 0 shows the bare image, 1 the light
    this.animation = 0;
    frame.append(this.canvas);
  }

  // weights: a map's 64 numbers, 0 to 255, or null for the bare image. boxes: [x, y, width, height] in shares of it.
  show(weights, boxes = []) {
    const light = weights ? upsample(weights, this.canvas.width, this.canvas.height) : this.now.light;
    this.frame.classList.toggle("heat", Boolean(weights) && this.look().heat);
    this.drawBoxes(boxes);
    this.fadeTo({ light, strength: weights ? 1 : 0 });
  }

  fadeTo(goal) {
    cancelAnimationFrame(this.animation);
    const from = { light: this.now.strength ? this.now.light : goal.light, strength: this.now.strength };
    const start = performance.now();
    const step = () => {
      const share = lessMotion.matches ? 1 : Math.min((performance.now() - start) / FADE, 1);
      this.now = share === 1 ? goal : mix(from, goal, share);
      this.draw();
      if (share < 1) this.animation = requestAnimationFrame(step);
    };
    step();
  }

  draw() {
    const { data } = this.pixels;
    const { light, strength } = this.now;
    const { heat, darkness } = this.look();
    const opacity = 255 * strength * darkness;
    for (let i = 0; light && i < light.length; i++) {
      if (heat) {
        const colour = heatColours[Math.round(light[i] * 255)];
        for (let channel = 0; channel < 3; channel++) data[4 * i + channel] = colour[channel];
        data[4 * i + 3] = opacity * HEAT_OPACITY;
      } else {
        data[4 * i] = data[4 * i + 1] = data[4 * i + 2] = 0;
        data[4 * i + 3] = opacity * (1 - light[i]); // black of this opacity leaves 1 - darkness * (1 - light)
      }
    }
    this.context.putImageData(this.pixels, 0, 0);
  }

  drawBoxes(boxes) {
    this.frame.querySelectorAll(".box").forEach((box) => box.remove());
    for (const box of boxes) {
      const outline = document.createElement("div");
      outline.className = "box";
      ["left", "top", "width", "height"].forEach((side, i) => (outline.style[side] = `${100 * box[i]}%`));
      this.frame.append(outline);
    }
  }
}

function mix(from, to, share) {
  return {
    light: from.light && to.light.map((value, i) => from.light[i] + share * (value - from.light[i])),
    strength: from.strength + share * (to.strength - from.strength),
  };
}

function sizeOf(image) {
  return [image.getAttribute("width"), image.getAttribute("height")]; // of the file; image.width is that on the screen
}
