// The AI SDK: @ai-sdk/openai-compatible, and @ai-sdk/openai, whose default is the Responses API.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, isStepCount, Output, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { call, checkCallOrText, checkText, checkWeather, cities, model, openaiUrl, weatherQuestion } from "./harness.mjs";

const city = z.object({ name: z.string().max(20), country: z.enum(["France", "Italy", "Norway"]) });
const weather = tool({
  description: "The weather of a city",
  inputSchema: z.object({ city: z.enum(cities) }),
  execute: async (input) => `Sunny in ${input.city}`,
});
const question = { prompt: weatherQuestion, tools: { get_weather: weather } };
const compatible = createOpenAICompatible({ name: "max_ray", baseURL: openaiUrl });
const structured = createOpenAICompatible({ name: "max_ray", baseURL: openaiUrl, supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL: openaiUrl, apiKey: "-" });

async function checkTextAndStream(chosen) {
  const whole = await generateText({ model: chosen, prompt: "Say hello.", maxOutputTokens: 40 });
  checkText(whole.text);
  assert.ok(["stop", "length"].includes(whole.finishReason), whole.finishReason);
  const streamed = streamText({ model: chosen, prompt: "Say hello.", maxOutputTokens: 40 });
  let text = "";
  for await (const piece of streamed.textStream) text += piece;
  checkText(text);
  assert.equal(await streamed.text, text);
}

async function checkTools(chosen) {
  const free = await generateText({ model: chosen, ...question, maxOutputTokens: 80 });
  checkCallOrText(free.text, free.toolCalls.map((each) => [each.toolName, each.input]));
  const forced = await generateText({ model: chosen, ...question, toolChoice: "required", maxOutputTokens: 100 });
  assert.equal(forced.finishReason, "tool-calls");
  for (const each of forced.toolCalls) checkWeather(each.toolName, each.input);
  assert.match(forced.toolResults[0].output, /^Sunny in/);
}

async function checkTwoSteps(chosen) {
  const { steps } = await generateText({
    model: chosen,
    ...question,
    maxOutputTokens: 100,
    stopWhen: isStepCount(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  });
  assert.equal(steps.length, 2);
  checkText(steps[1].text);
}

async function checkObjects(chosen) {
  const prompt = "Tell me about Paris.";
  const { object } = await generateObject({ model: chosen, schema: city, prompt });
  city.parse(object);
  const { output } = await generateText({ model: chosen, output: Output.object({ schema: city }), prompt });
  city.parse(output);
  const streamed = streamObject({ model: chosen, schema: city, prompt });
  let pieces = 0;
  for await (const _ of streamed.partialObjectStream) pieces += 1;
  assert.ok(pieces > 1, "the object did not come in pieces");
  city.parse(await streamed.object);
}

const compatibleName = "AI SDK openai-compatible";
call(compatibleName, "generateText, streamText", "text and finishReason; the pieces are the text", () =>
  checkTextAndStream(compatible(model)));
call(compatibleName, "generateText with messages, turn 2", "text", async () => {
  const asked = { model: compatible(model), maxOutputTokens: 30 };
  const user = { role: "user", content: "Say hello." };
  const first = await generateText({ ...asked, messages: [user] });
  checkText((await generateText({ ...asked, messages: [user, ...first.response.messages, user] })).text);
});
call(compatibleName, "completionModel", "text", async () => {
  const answer = await generateText({ model: compatible.completionModel(model), prompt: "Once upon", maxOutputTokens: 20 });
  checkText(answer.text);
});
call(compatibleName, "generateObject, default (json_object)", "accepted; the object's fields are the model's own", async () => {
  const prompt = 'Answer with {"ok": true}.';
  const { object } = await generateObject({ model: compatible(model), output: "no-schema", prompt, temperature: 0, maxOutputTokens: 400 });
  assert.equal(typeof object, "object");
});
call(compatibleName, "generateObject, Output.object, streamObject with supportsStructuredOutputs", "three objects that fit the schema", () =>
  checkObjects(structured(model)));
call(compatibleName, "tools, auto and required", "a text or calls; then input that fits the schema, and the tool ran", () =>
  checkTools(compatible(model)));
call(compatibleName, "tools, two steps", "a text after the tool's result", () => checkTwoSteps(compatible(model)));

call("AI SDK openai", "openai(model): generateText, streamText (Responses)", "text and finishReason; the pieces are the text", () =>
  checkTextAndStream(openai(model)));
call("AI SDK openai", "openai(model): generateObject, Output.object, streamObject", "three objects that fit the schema", () =>
  checkObjects(openai(model)));
call("AI SDK openai", "openai(model): tools, auto and required", "a text or calls; then input that fits the schema, and the tool ran", () =>
  checkTools(openai(model)));
call("AI SDK openai", "openai(model): tools, two steps", "a text after the tool's result", () => checkTwoSteps(openai(model)));
call("AI SDK openai", "openai.chat(model): generateText, streamText", "text and finishReason; the pieces are the text", () =>
  checkTextAndStream(openai.chat(model)));
call("AI SDK openai", "openai.chat(model): generateObject, Output.object, streamObject", "three objects that fit the schema", () =>
  checkObjects(openai.chat(model)));
