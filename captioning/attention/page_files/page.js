
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

// The page

const WORDS_PER_SECOND = 2.5; // while a caption is played: reading pace
const CALM_WORDS_PER_SECOND = 1; // for readers who asked their system for less motion

const form = document.querySelector(".controls");
const darkness = document.getElementById("darkness");
const overlays = new WeakMap(); // frame element -> Overlay

let hovered = null; // the word below the mouse
let selected = null; // the word that was clicked, touched, reached with a key, or is played
let shown = null; // the word whose light is on the image
let playing = null; // {button, words, next, timer} while a caption is played

function overlayOf(word) {
  const frame = word.closest("article").querySelector(".frame");
  if (!frame.querySelector("img")) return null; // the image could not be read
  if (!overlays.has(frame)) overlays.set(frame, new Overlay(frame, look));
  return overlays.get(frame);
}

function look() {
  return { heat: form.elements.show.value === "heat", darkness: darkness.value / 100 };
}

function chosenMap() {
  return form.elements.map.value;
}

// The 64 numbers of a word's map, or null where this map is not known.
function readMap(word) {
  const text = word.dataset[chosenMap()];
  return text ? Uint8Array.from(atob(text), (character) => character.charCodeAt(0)) : null;
}

function light(word) {
  overlayOf(word)?.show(readMap(word), JSON.parse(word.dataset.boxes ?? "[]"));
  const peak = word.dataset[`${chosenMap()}Peak`];
  const more = peak ? `, peak ${peak}×` : readMap(word) ? "" : ", no evidence was kept";
  statusOf(word).textContent = word.title + more;
}

// Show the word that is pointed at, or else the one that was chosen.
function refresh() {
  const word = hovered ?? selected;
  if (word === shown) return;
  const before = shown;
  shown = word;
  if (before) {
    before.classList.remove("active");
    statusOf(before).textContent = "";
    if (!word || overlayOf(word) !== overlayOf(before)) overlayOf(before)?.show(null);
  }
  if (word) {
    word.classList.add("active");
    light(word);
  }
}

function statusOf(word) {
  return word.closest("article").querySelector(".status");
}

// Playing a caption

function play(button) {
  const words = [...button.closest(".caption").querySelectorAll(".word")];
  playing = { button, words, next: 0, timer: 0 };
  button.classList.add("playing");
  button.setAttribute("aria-pressed", "true");
  playNext();
}

function playNext() {
  if (playing.next === playing.words.length) {
    stopPlaying();
    selected = null;
  } else {
    selected = playing.words[playing.next++];
    const pace = lessMotion.matches ? CALM_WORDS_PER_SECOND : WORDS_PER_SECOND;
    playing.timer = setTimeout(playNext, 1000 / pace);
  }
  refresh();
}

function stopPlaying() {
  if (!playing) return;
  clearTimeout(playing.timer);
  playing.button.classList.remove("playing");
  playing.button.setAttribute("aria-pressed", "false");
  playing = null;
}

// Mouse, touch and keys

function wordAt(event) {
  return event.target instanceof Element ? event.target.closest(".word") : null;
}

document.addEventListener("pointerover", (event) => {
  if (event.pointerType === "touch") return; // a touch chooses the word by its click
  const word = wordAt(event);
  if (word) stopPlaying();
  // Between two words of a caption the first one stays, so that nothing flickers.
  else if (hovered && event.target instanceof Node && hovered.parentElement.contains(event.target)) return;
  hovered = word;
  refresh();
});

document.documentElement.addEventListener("pointerleave", () => {
  hovered = null;
  refresh();
});

let chosenBefore = null; // the word that was chosen when the button went down, which also moves the focus

document.addEventListener("pointerdown", () => (chosenBefore = selected));

document.addEventListener("click", (event) => {
  const word = wordAt(event);
  const button = event.target.closest(".play");
  if (word) {
    stopPlaying();
    const again = event.detail === 0 ? selected === word : chosenBefore === word;
    selected = again ? null : word;
  } else if (button) {
    const stopped = playing?.button === button;
    stopPlaying();
    hovered = null;
    if (!stopped) play(button);
  } else if (event.target.closest(".frame")) {
    stopPlaying();
    selected = null;
  }
  refresh();
});

document.addEventListener("focusin", (event) => {
  const word = wordAt(event);
  if (!word) return;
  stopPlaying();
  for (const other of word.parentElement.children) other.tabIndex = other === word ? 0 : -1;
  selected = word;
  refresh();
  if (word.matches(":focus-visible")) {
    // Reached with a key: the word is to be seen, and as much of the image as there is room for.
    word.closest("article").querySelector(".frame").scrollIntoView({ block: "nearest" });
    word.scrollIntoView({ block: "nearest" });
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    stopPlaying();
    hovered = selected = null;
    refresh();
    return;
  }
  const word = wordAt(event);
  if (!word || event.ctrlKey || event.altKey || event.metaKey) return;
  const words = [...word.parentElement.children];
  const place = words.indexOf(word);
  const onwards = getComputedStyle(word).direction === "rtl" ? -1 : 1;
  const goals = { ArrowRight: place + onwards, ArrowLeft: place - onwards, Home: 0, End: words.length - 1 };
  if (!(event.key in goals)) return;
  event.preventDefault();
  hovered = null; // the key was pressed after the mouse stopped here
  words[Math.min(Math.max(goals[event.key], 0), words.length - 1)].focus();
  refresh();
});

// The bar of controls

form.addEventListener("submit", (event) => event.preventDefault());

form.addEventListener("input", (event) => {
  const { heat } = look();
  document.getElementById("darkness-name").textContent = heat ? "Strength" : "Darkness";
  form.querySelector(".scale").hidden = !heat;
  if (event.target.name === "map") {
    remember(chosenMap());
    if (shown) light(shown);
  } else if (shown) {
    const overlay = overlayOf(shown);
    overlay?.frame.classList.toggle("heat", heat && Boolean(readMap(shown)));
    overlay?.draw();
  }
});

// The choice of the map outlives the page, where the browser lets a file keep something.

const CHOICE = "attention page: map";

function remember(map) {
  try {
    localStorage.setItem(CHOICE, map);
  } catch {
    // the page then opens with attention weights, as it did the first time
  }
}

function recall() {
  try {
    return localStorage.getItem(CHOICE);
  } catch {
    return null;
  }
}

// The page as it starts

function drawScale() {
  const canvas = document.getElementById("scale");
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${heatColours[Math.round((255 * x) / (canvas.width - 1))].join(" ")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

for (const image of document.querySelectorAll(".frame img")) {
  const [width, height] = sizeOf(image);
  image.parentElement.style.setProperty("--aspect", width / height);
}
for (const words of document.querySelectorAll('[role="toolbar"]')) {
  [...words.children].forEach((word, i) => (word.tabIndex = i ? -1 : 0)); // Tab goes to a caption, arrows to its words
}
const pages = document.querySelector("nav");
if (pages) document.querySelector("header").append(pages.cloneNode(true)); // at the top, too
drawScale();
if (recall() === "evidence") form.elements.map.value = "evidence";
form.hidden = false;
form.dispatchEvent(new Event("input")); // the browser may have kept an earlier choice
