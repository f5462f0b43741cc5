// Runs the calls of one client and writes one JSON line a call, as tests/clients/harness.py does.
import assert from "node:assert/strict";
import { appendFileSync } from "node:fs";

export const url = process.env.URL ?? "http://127.0.0.1:8000";
export const openaiUrl = `${url}/v1`;
export const model = process.env.MODEL;
export const hello = [{ role: "user", content: "Say hello." }];
export const weatherQuestion = "What is the weather in Paris?";
export const cities = ["Paris", "Rome", "Oslo"];
export const weatherSchema = {
  type: "object",
  properties: { city: { type: "string", enum: cities } },
  required: ["city"],
  additionalProperties: false,
};
const TIMEOUT_MS = 300_000; // of one call
const registered = [];

/** Adds a call to the table: `judgedBy` says what of its answer is checked. */
export function call(client, name, judgedBy, run) {
  registered.push({ client, name, judgedBy, run });
}

export function checkText(text) {
  assert.equal(typeof text, "string");
  assert.ok(text.trim(), "the text is empty");
}

/** A call of the weather tool whose arguments fit its schema. */
export function checkWeather(name, argumentsOrText) {
  const found = typeof argumentsOrText === "string" ? JSON.parse(argumentsOrText) : argumentsOrText;
  assert.equal(name, "get_weather");
  assert.deepEqual(Object.keys(found), ["city"]);
  assert.ok(cities.includes(found.city), found.city);
}

/** What a model may answer when the choice is its own; `calls` are pairs of a name and arguments. */
export function checkCallOrText(text, calls) {
  if (!calls.length) checkText(text);
  for (const [name, found] of calls) {
    assert.equal(name, "get_weather");
    assert.equal(typeof (typeof found === "string" ? JSON.parse(found) : found), "object");
  }
}

function expire(reject) {
  return setTimeout(() => reject(new Error(`no result after ${TIMEOUT_MS / 1000} s`)), TIMEOUT_MS);
}

async function outcomeOf({ run }) {
  let timer;
  const late = new Promise((_, reject) => (timer = expire(reject)));
  try {
    await Promise.race([run(), late]);
    return { outcome: "works", why: "" };
  } catch (error) {
    console.error(error);
    return { outcome: "fails", why: `${error.name}: ${error.message}` };
  } finally {
    clearTimeout(timer);
  }
}

/** Runs all calls in order; gives the number of those that failed. */
export async function runAll(results) {
  let failures = 0;
  for (const entry of registered.filter((each) => `${each.client} ${each.name}`.includes(process.env.ONLY ?? ""))) {
    const { outcome, why } = await outcomeOf(entry);
    failures += outcome === "fails";
    console.log(`${entry.client}, ${entry.name}: ${outcome}`);
    const line = { client: entry.client, call: entry.name, judged_by: entry.judgedBy, outcome, why };
    appendFileSync(results, `${JSON.stringify(line)}\n`);
  }
  return failures;
}
