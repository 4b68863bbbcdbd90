
"use strict";

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

function lookAway() {
  stopPlaying();
  hovered = selected = null;
  refresh();
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
    lookAway();
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

// An article with its image and its words in place.
function setUpArticle(article) {
  for (const image of article.querySelectorAll(".frame img")) {
    const [width, height] = sizeOf(image);
    image.parentElement.style.setProperty("--aspect", width / height);
  }
  for (const words of article.querySelectorAll('[role="toolbar"]')) {
    [...words.children].forEach((word, i) => (word.tabIndex = i ? -1 : 0)); // Tab goes to a caption, arrows to its words
  }
}

function drawScale() {
  const canvas = document.getElementById("scale");
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${heatColours[Math.round((255 * x) / (canvas.width - 1))].join(" ")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

document.querySelectorAll("article").forEach(setUpArticle);
const pages = document.querySelector("nav");
if (pages) document.querySelector("header").append(pages.cloneNode(true)); // at the top, too
drawScale();
if (recall() === "evidence") form.elements.map.value = "evidence";
form.hidden = false;
form.dispatchEvent(new Event("input")); // the browser may have kept an earlier choice
