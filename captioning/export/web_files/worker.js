"use strict";

// The worker: loads the models and captions images, away from the page, which so never freezes.

const MOST_THREADS = 4; // more bring little
const PREVIEW_SIDE = 1080; // pixels of the longer side of the image that the page shows

let captioner = null; // {about, vocabulary, models, ort}
let working = Promise.resolve(); // the tasks that have been given, one after the other
const encodings = new Map(); // number of an image -> what the encoder says of it

// Loading

// The runtime, and the captioner's models as functions of tensors by name that return tensors by name.
async function load({ about, base, device }) {
  const { files, gpu_files } = about;
  const total = Object.values(files).reduce((sum, { bytes }) => sum + bytes, 0);
  const data = await getFiles(files, base, (bytes) => postMessage({ kind: "progress", bytes, total }));
  postMessage({ kind: "preparing" });
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  const ort = await startRuntime(data.script, data.wasm, threads);
  const models = {};
  for (const name of ["encoder", "decoder", "evidence"]) {
    const session = await ort.InferenceSession.create(data[name], { executionProviders: ["wasm"] });
    models[name] = (inputs) => session.run(inputs);
    delete data[name];
  }
  const vocabulary = JSON.parse(new TextDecoder().decode(data.vocabulary));
  captioner = { about, vocabulary, models, ort };
  postMessage({ kind: "ready", threads: ort.env.wasm.numThreads });
  await forgetOthers({ ...files, ...gpu_files }, base);
  if (device !== "wasm") moveToGpu(about, base, device).catch(stayWithWasm); // meanwhile wasm captions
}

// Let the GPU encode images, if it computes what wasm computes, for as long as it does not fail.
async function moveToGpu(about, base, device) {
  const { models } = captioner;
  const onGpu = await makeGpuEncoder(about, base, device);
  const byWasm = models.encoder;
  const inputs = encoderInputs(drawTestImage(about.sizes.image));
  const outputs = await onGpu(inputs);
  await enqueue(async () => checkOutputs(outputs, await byWasm(inputs)));
  models.encoder = (inputs) =>
    onGpu(inputs).catch((error) => {
      models.encoder = byWasm;
      stayWithWasm(error);
      return byWasm(inputs);
    });
  postMessage({ kind: "device", device: "webgpu", reason: "" });
}

function stayWithWasm(error) {
  postMessage({ kind: "device", device: "wasm", reason: error?.message ?? String(error) });
}

async function startRuntime(script, wasm, threads) {
  // Its threads start from this address too, so it stays valid.
  const ort = await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.numThreads = threads;
  return ort;
}

// Images

// Decode an image file, tell the page what it looks like, and squeeze it for the network.
async function readImage(number, file) {
  const start = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  const isJpeg = start[0] === 0xff && start[1] === 0xd8;
  const image = await createImageBitmap(file, { imageOrientation: "from-image" }); // in sRGB, as the scripts take it
  try {
    const { width, height } = image;
    postMessage({ kind: "image", number, ...(await makePreview(image)) });
    const side = captioner.about.sizes.image;
    return squeezeImage(rowReader(image), width, height, isJpeg ? jpegRatio(width, height, side) : 1, side);
  } finally {
    image.close();
  }
}

async function makePreview(image) {
  const scale = Math.min(PREVIEW_SIDE / Math.max(image.width, image.height), 1);
  const [width, height] = [image.width, image.height].map((side) => Math.max(Math.round(side * scale), 1));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  return { width, height, preview: await canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 }) };
}

// A function of (first row, count) that returns the RGBA of an image's rows, on white.
function rowReader(image) {
  let canvas = null;
  return (top, count) => {
    if (canvas?.height !== count) canvas = new OffscreenCanvas(image.width, count);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, image.width, count);
    context.drawImage(image, 0, top, image.width, count, 0, 0, image.width, count);
    return context.getImageData(0, 0, image.width, count).data;
  };
}

// Captions

async function caption({ number, file, beams }) {
  const { about, models } = captioner;
  if (!encodings.has(number)) {
    const pixels = await readImage(number, file);
    encodings.set(number, await models.encoder(encoderInputs(pixels)));
  }
  const encoded = encodings.get(number);
  const found = await beamSearch(encoded.hidden.data, decoderOf(encoded), { ...about.decoding, beam_width: beams });
  const ids = found.ids.filter((id) => id !== END);
  const words = ids.map((id) => captioner.vocabulary[id]);
  const blanks = parted(words, about.characters);
  const attention = found.attention.slice(0, ids.length);
  postMessage({ kind: "caption", number, beams, ids, words, blanks, logProbs: found.logProbs, attention });
}

function encoderInputs(pixels) {
  const { image: side } = captioner.about.sizes;
  return { pixels: new captioner.ort.Tensor("uint8", pixels, [1, side, side, 3]) };
}

// The decoder for one image, as `beamSearch` calls it for the next word of K captions.
function decoderOf({ encoded_features, keys }) {
  const { models, ort } = captioner;
  return async (words, hidden) => {
    const [count, units] = [words.length, hidden[0].length];
    const states = new Float32Array(count * units);
    hidden.forEach((state, beam) => states.set(state, beam * units));
    const step = await models.decoder({
      words: new ort.Tensor("int32", Int32Array.from(words), [count, 1]),
      hidden: new ort.Tensor("float32", states, [count, units]),
      encoded_features,
      keys,
    });
    const { log_probs, next_hidden, attention_weights } = step;
    return { logProbs: splitRows(log_probs), hidden: splitRows(next_hidden), attention: splitRows(attention_weights) };
  };
}

function splitRows({ data, dims: [count, size] }) {
  return Array.from({ length: count }, (_, row) => data.subarray(row * size, (row + 1) * size));
}

// For each word of a caption the locations that made the model say it. A task of its own, as captions come first.
async function evidence({ number, beams, ids }) {
  const { models, ort } = captioner;
  let { hidden, ...image } = encodings.get(number);
  const tensor = (id) => new ort.Tensor("int32", Int32Array.of(id), [1, 1]);
  const maps = [];
  let before = START;
  for (const id of ids) {
    const step = await models.evidence({ words: tensor(before), said: tensor(id), hidden, ...image });
    before = id;
    hidden = step.next_hidden;
    maps.push(step.evidence.data);
  }
  postMessage({ kind: "evidence", number, beams, evidence: maps });
}

// Tasks, one at a time

const tasks = { load, caption, evidence };

function enqueue(task) {
  const done = working.then(task);
  working = Promise.allSettled([done]);
  return done;
}

onmessage = ({ data }) => {
  enqueue(() => tasks[data.kind](data)).catch((error) => {
    postMessage({ kind: "failed", task: data.kind, number: data.number, reason: error?.message ?? String(error) });
  });
};
