"use strict";

// The encoder on the GPU, by WebGPU. Captions stay those of wasm: the GPU takes over only where it computes the same.

const MOST_ERROR = 5e-4; // of an output, for a largest number of 1. float16 weights change InceptionV3's by more

// The encoder as a function of tensors that runs on the GPU, and rejects once the GPU is lost.
// wanted: "webgpu" takes a software adapter too, which is slower than wasm.
async function makeGpuEncoder({ files, gpu_files }, base, wanted) {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error("this browser offers no GPU");
  const isSoftware = adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter; // older browsers have it there
  if (isSoftware && wanted !== "webgpu") throw new Error("this browser's GPU is software");
  const data = await getFiles({ encoder: files.encoder, ...gpu_files }, base, () => {});
  const ort = await startRuntime(data.gpu_script, data.gpu_wasm, 1);
  const session = await ort.InferenceSession.create(data.encoder, { executionProviders: ["webgpu"] });
  const { lost } = await ort.env.webgpu.device;
  const loss = lost.then(({ message }) => ({ error: new Error(`the GPU is lost: ${message}`) }));
  return async (inputs) => {
    const outputs = await Promise.race([loss, session.run(inputs)]);
    if (outputs.error) throw outputs.error;
    return outputs;
  };
}

// Waves of other lengths and directions in each colour. -> Uint8Array (side, side, 3)
function drawTestImage(side) {
  const wave = (y, x, channel) => 127.5 * (1 + Math.sin((x + channel * y) / (4 + 9 * channel)) * Math.cos(y / 17));
  return Uint8Array.from({ length: side * side * 3 }, (_, i) =>
    wave(Math.floor(i / (3 * side)), Math.floor(i / 3) % side, i % 3),
  );
}

// Throw an error if a model's outputs by name are not those expected.
function checkOutputs(outputs, expected) {
  for (const [name, { data }] of Object.entries(expected)) {
    const largest = data.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const apart = data.reduce((most, value, i) => Math.max(most, Math.abs(value - outputs[name].data[i])), 0);
    if (!(apart <= MOST_ERROR * largest)) throw new Error(`the GPU computes another ${name}, ${apart / largest} apart`);
  }
}
