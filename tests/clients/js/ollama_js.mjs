// The ollama package for JavaScript.
import assert from "node:assert/strict";
import { Ollama } from "ollama";
import { call, checkText, hello, model, url } from "./harness.mjs";

const name = "ollama (JavaScript)";
const ollama = new Ollama({ host: url });
const options = { num_predict: 30, temperature: 0 };

call(name, "chat, stream, generate, list", "text; the greedy pieces are the text; text; the served model", async () => {
  const whole = await ollama.chat({ model, messages: hello, options });
  checkText(whole.message.content);
  let text = "";
  for await (const part of await ollama.chat({ model, messages: hello, options, stream: true })) text += part.message.content;
  assert.equal(text, whole.message.content);
  checkText((await ollama.generate({ model, prompt: "Say hello.", options })).response);
  assert.deepEqual((await ollama.list()).models.map((each) => each.model), [model]);
});
call(name, "chat(format=schema)", "an object of the schema", async () => {
  const format = { type: "object", properties: { capital: { type: "boolean" } }, required: ["capital"], additionalProperties: false };
  const answer = await ollama.chat({ model, messages: [{ role: "user", content: "Is Paris a capital?" }], format });
  assert.equal(typeof JSON.parse(answer.message.content).capital, "boolean");
});
