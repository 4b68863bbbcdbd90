"use strict";

// Beam search, greedy with one beam: what the scripts do, word by word. K beams, V words, U units.

const [PAD, , START, END] = [0, 1, 2, 3]; // the first words of the vocabulary
const NEVER = -1e9;

// The words that would say a sequence of `length` words twice; none for 0.
function findRepeats(said, length) {
  const last = said.slice(said.length - length + 1);
  const found = [];
  for (let start = 0; length && start + length <= said.length; start++)
    if (last.every((word, i) => said[start + i] === word)) found.push(said[start + length - 1]);
  return found;
}

// The `count` best of all beams' continuations, the best first, and of equals the first.
// Each is {beam, word, rank, score, logProb}. A beam that has ended goes on with <pad> alone, and keeps its place.
function bestContinuations(beams, logProbs, count) {
  const best = [];
  const offer = (candidate) => {
    if (best.length === count && candidate.rank <= best[count - 1].rank) return;
    let place = best.length;
    while (place && best[place - 1].rank < candidate.rank) place--;
    best.splice(place, 0, candidate);
    best.length = Math.min(best.length, count);
  };
  beams.forEach(({ ended, score }, beam) => {
    if (ended) return offer({ beam, word: PAD, rank: 1, score, logProb: 0 });
    logProbs[beam].forEach((logProb, word) => {
      const sum = Math.fround(score + logProb);
      if (best.length < count || sum > best[count - 1].rank) offer({ beam, word, rank: sum, score: sum, logProb });
    });
  });
  return best;
}

// The likeliest caption of those that `beam_width` beams keep in view.
// hidden: Float32Array (U,), the first one.
// decode: async function of (words, hidden states of K beams) -> {logProbs, hidden, attention}, an array of rows each.
// -> {ids, logProbs, attention}: numbers of words with <end>, their log-probabilities and attention weights
async function beamSearch(hidden, decode, { max_words, beam_width, length_penalty, repeat_block }) {
  let beams = Array.from({ length: beam_width }, (_, beam) => ({
    score: beam ? -1e6 : 0, // all beams are alike, so only one begins
    ended: false,
    said: [START],
    logProbs: [],
    attention: [],
    hidden,
  }));
  for (let length = 0; length < max_words && !beams.every(({ ended }) => ended); length++) {
    const step = await decode(
      beams.map(({ said }) => said[length]),
      beams.map((beam) => beam.hidden),
    );
    beams.forEach(({ said }, beam) => {
      for (const word of findRepeats(said, repeat_block)) step.logProbs[beam][word] = NEVER;
    });
    beams = bestContinuations(beams, step.logProbs, beam_width).map(({ beam, word, score, logProb }) => ({
      score,
      ended: word === END || word === PAD,
      said: [...beams[beam].said, word],
      logProbs: [...beams[beam].logProbs, logProb],
      attention: [...beams[beam].attention, step.attention[beam]],
      hidden: step.hidden[beam],
    }));
  }
  const someEnded = beams.some(({ ended }) => ended);
  const lengthOf = ({ said }) => said.slice(1).filter((word) => word !== PAD).length;
  const value = (beam) => (beam.ended || !someEnded ? beam.score / lengthOf(beam) ** length_penalty : -Infinity);
  const best = beams.reduce((one, other) => (value(other) > value(one) ? other : one));
  const length = lengthOf(best);
  return {
    ids: best.said.slice(1, 1 + length),
    logProbs: best.logProbs.slice(0, length),
    attention: best.attention.slice(0, length),
  };
}

// For each word of a caption whether a blank is before it: none stands next to a character that is a word of its own.
function parted(words, characters) {
  const character = new RegExp(`^[${characters}]`, "u");
  return words.map((word, i) => i > 0 && !character.test(words[i - 1]) && !character.test(word));
}
