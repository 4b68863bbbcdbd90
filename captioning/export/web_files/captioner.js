"use strict";

// The reader's images, from the file to the words below them. page.js makes the words light the image.

const MOST_PIXELS = 100_000_000; // of an image
const SHADES = 10; // steps from the faintest word to the darkest
const FAINTEST = 0.01; // probability at and below which a word is shown in the faintest shade
const WORKER_FILES = ["files.js", "pixels.js", "decoding.js", "gpu.js", "worker.js"];
const SIMD = [
  // A WebAssembly module whose one function uses SIMD
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];
const PANEL = { width: 300, gap: 6, columns: 5, line: 36 }; // of a figure, in pixels

const drop = document.querySelector(".drop");
const loading = document.querySelector(".loading");
const failure = document.querySelector(".failure");
// number -> {number, file, article, preview, caption, problem}; problem: undefined until the file is checked, "" if none
const images = new Map();
let worker = null;

// Starting

// What keeps this page from working here, or "".
function whatIsMissing() {
  if (location.protocol === "file:")
    return "A file may load no models: run “python -m http.server” in this folder, and open http://127.0.0.1:8000/.";
  const usable = "WebAssembly" in self && WebAssembly.validate(Uint8Array.from(SIMD)) && "OffscreenCanvas" in self;
  return usable ? "" : "This browser is too old for this page (it lacks WebAssembly SIMD or OffscreenCanvas).";
}

async function start() {
  failure.hidden = true;
  loading.hidden = false;
  showProgress(0, 0);
  let about; // the sizes, settings and files of the captioner
  try {
    about = JSON.parse(await fetchText("captioner.json"));
    // As a blob the worker keeps to the page's Content Security Policy.
    const parts = await Promise.all(WORKER_FILES.map(fetchText));
    worker = new Worker(URL.createObjectURL(new Blob(parts, { type: "text/javascript" })), { type: "module" });
  } catch (error) {
    return fail(`${error.message}. Is the connection down?`);
  }
  worker.onmessage = ({ data }) => answers[data.kind](data);
  worker.onerror = (event) => fail(`The captioner ended: ${event.message ?? "this browser does not let it run"}.`);
  const device = location.hash.slice(1); // #wasm or #webgpu, for those who want that one
  worker.postMessage({ kind: "load", about, base: new URL(".", location.href).href, device });
  if (!chosenBeams()) chooseBeams(about.decoding.beam_width);
  // Captions come before the evidence of those that are there already: what captioned them may have failed.
  const waiting = [...images.values()].filter(({ problem, article }) => problem === "" && !hasEvidence(article));
  for (const image of waiting.sort((a, b) => Boolean(a.caption) - Boolean(b.caption))) ask(image);
}

// Once a worker has failed (a phone's memory is full, say), it may fail at each image that follows. A new one goes on.
function startAgain() {
  worker.onmessage = null;
  worker.terminate();
  worker = null;
  start();
}

const hasEvidence = (article) => article.querySelector("[data-evidence]") !== null;

async function fetchText(name) {
  // What is kept may be of an earlier export: a host that dates files by the second says that nothing changed.
  const response = await fetch(name, { cache: "no-store" }).catch(() => null);
  if (!response?.ok) throw new Error(`${name} did not arrive`);
  return response.text();
}

function fail(reason) {
  worker?.terminate();
  worker = null;
  loading.hidden = true;
  failure.hidden = false;
  failure.querySelector("span").textContent = reason;
}

function showProgress(bytes, total) {
  const megabytes = (count) => Math.round(count / 1e6);
  loading.querySelector("progress").value = total ? bytes / total : 0;
  loading.querySelector("p").textContent = total
    ? `Loading the captioner: ${megabytes(bytes)} of ${megabytes(total)} MB`
    : "Loading the captioner";
}

// What the worker says

const answers = {
  progress: ({ bytes, total }) => showProgress(bytes, total),
  preparing: () => (loading.querySelector("p").textContent = "Getting ready"),
  ready: ({ threads }) => {
    loading.hidden = true;
    document.body.dataset.threads = threads;
    showDevice("wasm", "");
  },
  device: ({ device, reason }) => showDevice(device, reason),
  image: ({ number, preview, width, height }) => showImage(images.get(number), preview, width, height),
  caption: (found) => {
    const { number, beams, ids } = found;
    if (beams !== chosenBeams()) return; // another number was chosen meanwhile
    showCaption(images.get(number), found);
    worker.postMessage({ kind: "evidence", number, beams, ids });
  },
  evidence: ({ number, beams, evidence }) => {
    const { article, caption } = images.get(number);
    if (caption.beams !== beams) return;
    setMaps([...article.querySelectorAll(".word")], evidence, "evidence");
    if (article.contains(shown)) light(shown);
  },
  failed: ({ task, number, reason }) => {
    if (task === "load") return fail(`The captioner could not be loaded: ${reason}.`);
    const image = images.get(number);
    if (!image.triedAgain) {
      image.triedAgain = true;
      startAgain();
    } else if (!image.caption) showProblem(image, `It could not be captioned: ${reason}.`);
  },
};

// Say what computes, and why not the GPU.
function showDevice(device, reason) {
  const { dataset } = document.body;
  dataset.device = device;
  const threads = `${dataset.threads} thread${dataset.threads === "1" ? "" : "s"} of your processor`;
  const line = document.querySelector(".device");
  line.textContent = `Computed by ${device === "webgpu" ? "your GPU and " : ""}${threads}`;
  line.title = reason;
}

function ask(image) {
  worker?.postMessage({ kind: "caption", number: image.number, file: image.file, beams: chosenBeams() });
}

// Images that come

function addAll(files) {
  const added = [...files].map((file, i) => {
    const number = images.size + i + 1;
    return { number, file, article: makeArticle(number, file.name), caption: null, preview: null };
  });
  for (const image of added) images.set(image.number, image);
  document.querySelector("main").prepend(...added.map(({ article }) => article));
  added[0]?.article.scrollIntoView({ behavior: lessMotion.matches ? "auto" : "smooth" });
  showTitle();
  added.forEach(check);
}

async function check(image) {
  image.problem = await whatIsWrong(image.file);
  if (image.problem) showProblem(image, image.problem);
  else ask(image);
}

// Why a file cannot be captioned, or "". Its size is known before it is decoded, which could fill the memory.
async function whatIsWrong(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  const known = await new Promise((resolve) => {
    image.onload = () => resolve(true);
    image.onerror = () => resolve(false);
  });
  URL.revokeObjectURL(image.src);
  if (!known) return "This browser cannot read it as an image.";
  const { naturalWidth, naturalHeight } = image;
  const tooLarge = naturalWidth * naturalHeight > MOST_PIXELS;
  return tooLarge ? `Its ${naturalWidth} × ${naturalHeight} pixels are too many.` : "";
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeArticle(number, name) {
  const heading = make("h2", { id: `image-${number}` }, make("bdi", {}, name || "image"));
  const waiting = make("p", { class: "waiting" }, "Waiting for its caption");
  const article = make("article", { "aria-labelledby": heading.id }, heading, make("div", { class: "frame" }));
  article.append(make("p", { class: "status" }), make("div", { class: "captions" }, waiting));
  return article;
}

function showImage(image, preview, width, height) {
  image.preview = make("img", { src: URL.createObjectURL(preview), alt: "", width, height, decoding: "async" });
  image.article.querySelector(".frame").replaceChildren(image.preview);
  setUpArticle(image.article);
}

function showProblem(image, problem) {
  image.problem = problem;
  image.article.querySelector(".frame").replaceChildren(make("p", { role: "alert" }, problem));
  image.article.querySelector(".captions").replaceChildren();
  showTitle();
}

// How far the work is, for a reader who looks at another tab.
function showTitle() {
  const all = [...images.values()];
  const done = all.filter(({ caption, problem }) => caption || problem).length;
  document.title = done < all.length ? `${done} of ${all.length} images – captioner` : "Image captioner";
}

// Captions

function showCaption(image, found) {
  image.caption = found;
  const text = captionText(found);
  image.preview.alt = text;
  const words = found.words.map((word, i) => makeWord(word, found.logProbs[i]));
  setMaps(words, found.attention, "weights");
  const toolbar = make("div", { role: "toolbar", "aria-label": "Words" });
  words.forEach((word, i) => toolbar.append(found.blanks[i] ? "\n" : "", word));
  const play = make("button", { type: "button", class: "play", "aria-pressed": "false", "aria-label": "Play" });
  const body = words.length ? [play, toolbar] : [make("div", {}, "(no words)")];
  const caption = make("div", { class: "caption", dir: "auto" }, ...body);
  const actions = make("div", { class: "actions" });
  actions.append(
    makeButton("Copy caption", (button) => copy(text, button)),
    makeButton("Download figure", () => download(image)),
  );
  if (image.article.contains(shown)) lookAway();
  image.article.querySelector(".captions").replaceChildren(make("div", {}, caption, actions));
  setUpArticle(image.article);
  document.querySelector("[role=status]").textContent = `${image.file.name}: ${text}`;
  showTitle();
}

function captionText({ words, blanks }) {
  return words.map((word, i) => (blanks[i] ? " " : "") + word).join("");
}

// A word as a button, as the page of attention has it.
function makeWord(word, logProb) {
  const probability = Math.exp(Math.min(logProb, 0));
  const said = probability >= 0.005 ? probability.toFixed(2) : "under 0.01";
  const title = `${word}: probability ${said}`;
  const sure = Math.round(SHADES * (1 - Math.log(Math.max(probability, FAINTEST)) / Math.log(FAINTEST)));
  return make("button", { type: "button", class: "word", title, "aria-label": title, "data-sure": sure }, word);
}

// Give each word its map, scaled as `scale_light` of the scripts does: all maps of a caption together.
function setMaps(words, maps, name) {
  const all = maps.flatMap((map) => [...map]);
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const scale = (value) => (most > least ? Math.sqrt((value - least) / (most - least)) : 0.5);
  words.forEach((word, i) => {
    const levels = maps[i].map((value) => Math.round(255 * scale(value)));
    word.dataset[name] = btoa(String.fromCharCode(...levels));
    const mean = maps[i].reduce((sum, value) => sum + value, 0) / maps[i].length;
    word.dataset[`${name}Peak`] = (Math.max(...maps[i]) / mean).toFixed(1);
  });
}

function makeButton(text, act) {
  const button = make("button", { type: "button", class: "button" }, text);
  button.addEventListener("click", () => act(button));
  return button;
}

async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // On a page without https there is no clipboard.
    button.textContent = "Not possible here";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

// The figure: the image, and for each word the image lit where the model looked

function drawFigure({ preview, caption, article }) {
  const { width, gap, columns, line } = PANEL;
  const [side, height] = [width - gap, Math.round((preview.naturalHeight / preview.naturalWidth) * (width - gap))];
  const canvas = make("canvas");
  canvas.width = columns * width;
  canvas.height = (Math.floor(caption.words.length / columns) + 1) * (height + line + gap);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `20px ${getComputedStyle(article).getPropertyValue("--book")}`;
  pen.fillStyle = "black";
  [null, ...article.querySelectorAll(".word")].forEach((word, i) => {
    const [left, top] = [(i % columns) * width, Math.floor(i / columns) * (height + line + gap)];
    pen.drawImage(preview, left, top + line, side, height);
    if (!word) return;
    pen.fillText(word.textContent, left + side / 2, top + line / 2, side);
    const panel = pen.getImageData(left, top + line, side, height);
    upsample(readMap(word) ?? [0], side, height).forEach((level, pixel) => {
      for (let channel = 0; channel < 3; channel++) panel.data[4 * pixel + channel] *= 0.2 + 0.8 * level;
    });
    pen.putImageData(panel, left, top + line);
  });
  return canvas;
}

function download(image) {
  drawFigure(image).toBlob((blob) => {
    const name = `${image.file.name.replace(/\.\w+$/, "")}_attention.png`;
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });
}

// Files, the clipboard, and the choice of beams

function chosenBeams() {
  return Number(document.querySelector("[name=beams]:checked")?.value ?? 0);
}

// Choose so many beams, or the nearest number that there is to choose.
function chooseBeams(count) {
  const choices = [...document.querySelectorAll("[name=beams]")];
  const distance = ({ value }) => Math.abs(value - count);
  choices.reduce((one, other) => (distance(other) < distance(one) ? other : one)).checked = true;
}

document.addEventListener("paste", (event) => addAll(event.clipboardData.files));

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});

document.addEventListener("dragleave", (event) => drop.classList.toggle("over", event.relatedTarget !== null));

document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  addAll(event.dataTransfer.files);
});

drop.addEventListener("change", ({ target }) => {
  if (target.type === "radio") {
    for (const image of images.values()) if (!image.problem) ask(image);
    return;
  }
  addAll(target.files);
  target.value = ""; // so that the same file can be chosen again
});

failure.querySelector("button").addEventListener("click", start);

const missing = whatIsMissing();
drop.hidden = Boolean(missing);
if (missing) {
  fail(missing);
  failure.querySelector("button").hidden = true;
} else start();
