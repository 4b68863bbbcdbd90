"use strict";

// The files that the captioner is made of: fetched, checked by their digests, and kept by the browser.

const TRIES = 3; // to fetch a file
const PAUSE = 1500; // milliseconds before the second try; twice as many before the third

// What the browser keeps for this folder, or null where it keeps nothing: pages from other machines need https for it.
async function openCache(base) {
  const name = `captioner ${new URL(base).pathname}`;
  return "caches" in self ? caches.open(name).catch(() => null) : null;
}

// A file's address in the cache. Its digest is in it, so another version is another file.
function keyOf(name, { sha256 }, base) {
  return new URL(`${name}?${encodeURIComponent(sha256)}`, base).href;
}

// Get all files, from the browser's cache where they are there.
// files: {name: {url, bytes, sha256}}; base: the page's address; tell: function of the count of bytes that are here.
// -> {name: Uint8Array}
async function getFiles(files, base, tell) {
  const cache = await openCache(base);
  const counts = {};
  const count = (name) => (bytes) => {
    counts[name] = bytes;
    tell(Object.values(counts).reduce((sum, part) => sum + part, 0));
  };
  const get = async ([name, file]) => [name, await getFile(cache, name, file, base, count(name))];
  return Object.fromEntries(await Promise.all(Object.entries(files).map(get)));
}

async function getFile(cache, name, file, base, tell) {
  const key = keyOf(name, file, base);
  const kept = await cache?.match(key);
  const data = kept && new Uint8Array(await kept.arrayBuffer());
  if (data?.length === file.bytes) {
    tell(data.length);
    return data;
  }
  const fetched = await fetchPatiently(file, base, tell);
  // Where there is no room for it, it is fetched again at the next visit.
  await cache?.put(key, new Response(fetched)).catch(() => cache.delete(key));
  return fetched;
}

async function fetchPatiently(file, base, tell) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await fetchFile(file, base, tell);
    } catch (error) {
      // A lost connection and, where fetch checks it, a wrong digest are TypeErrors that do not name the file.
      const named = error instanceof TypeError ? new Error(`${file.url} did not arrive as it should`) : error;
      if (attempt === TRIES) throw named;
      await new Promise((resolve) => setTimeout(resolve, attempt * PAUSE));
    }
  }
}

// Fetch a file and check its digest.
async function fetchFile({ url, bytes, sha256 }, base, tell) {
  // crypto.subtle is there on https and on this machine. Elsewhere the browser checks, but tells of no progress.
  const integrity = self.crypto?.subtle ? "" : `sha256-${sha256}`;
  const cache = "caches" in self ? "no-store" : "no-cache"; // one copy is enough
  const response = await fetch(new URL(url, base), { integrity, cache, credentials: "omit" });
  if (!response.ok) throw new Error(`${url} did not arrive (${response.status})`);
  const data = new Uint8Array(bytes);
  const reader = response.body.getReader();
  let length = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (length + part.value.length > bytes) throw new Error(`${url} is longer than it should be`);
    data.set(part.value, length);
    length += part.value.length;
    tell(length);
  }
  if (length < bytes) throw new Error(`${url} did not arrive whole`);
  if (!integrity && (await digest(data)) !== sha256) throw new Error(`${url} is damaged, or of another version`);
  return data;
}

async function digest(data) {
  return btoa(String.fromCharCode(...new Uint8Array(await crypto.subtle.digest("SHA-256", data))));
}

// Delete what the cache holds of earlier versions.
async function forgetOthers(files, base) {
  const cache = await openCache(base);
  const wanted = new Set(Object.entries(files).map(([name, file]) => keyOf(name, file, base)));
  for (const { url } of (await cache?.keys()) ?? []) if (!wanted.has(url)) await cache.delete(url);
}
