// The openai package for JavaScript.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { call, checkText, checkWeather, hello, model, openaiUrl, weatherQuestion, weatherSchema } from "./harness.mjs";

const name = "openai (JavaScript)";
const openai = new OpenAI({ baseURL: openaiUrl, apiKey: "-" });
const city = z.object({ name: z.string().max(20), country: z.enum(["France", "Italy", "Norway"]) });
const short = { model, messages: hello, max_tokens: 40 };

call(name, "chat.completions.create, stream", "text; the greedy pieces are the whole answer's text", async () => {
  const whole = await openai.chat.completions.create({ ...short, temperature: 0 });
  checkText(whole.choices[0].message.content);
  let text = "";
  for await (const chunk of await openai.chat.completions.create({ ...short, temperature: 0, stream: true }))
    text += chunk.choices[0]?.delta.content ?? "";
  assert.equal(text, whole.choices[0].message.content);
});
call(name, "chat.completions.stream (helper)", "the final message has the streamed text", async () => {
  const stream = openai.chat.completions.stream({ ...short, stream: true });
  let text = "";
  stream.on("content", (piece) => (text += piece));
  const final = await stream.finalChatCompletion();
  checkText(text);
  assert.equal(final.choices[0].message.content, text);
});
call(name, "turn 2 with the message object", "text", async () => {
  const first = await openai.chat.completions.create(short);
  const messages = [...hello, first.choices[0].message, ...hello];
  checkText((await openai.chat.completions.create({ ...short, messages })).choices[0].message.content);
});
call(name, "chat.completions.parse(zodResponseFormat)", "the object that zod parsed", async () => {
  const answer = await openai.chat.completions.parse({ model, messages: hello, response_format: zodResponseFormat(city, "city") });
  city.parse(answer.choices[0].message.parsed);
});
call(name, "responses.create, stream, parse(zodTextFormat)", "text; the pieces make a text; the object that zod parsed", async () => {
  const asked = { model, input: "Say hello.", max_output_tokens: 40 };
  checkText((await openai.responses.create(asked)).output_text);
  let text = "";
  for await (const event of await openai.responses.create({ ...asked, stream: true }))
    if (event.type === "response.output_text.delta") text += event.delta;
  checkText(text);
  const parsed = await openai.responses.parse({ model, input: "Paris?", text: { format: zodTextFormat(city, "city") } });
  city.parse(parsed.output_parsed);
});
call(name, "chat.completions.runTools", "the function ran with a city; its result went back", async () => {
  const called = [];
  const run = openai.chat.completions.runTools(
    {
      model,
      messages: [{ role: "user", content: weatherQuestion }],
      max_tokens: 100,
      tool_choice: { type: "function", function: { name: "get_weather" } },
      tools: [
        {
          type: "function",
          function: {
            name: "get_weather",
            description: "The weather of a city",
            parameters: weatherSchema,
            parse: JSON.parse,
            function: (input) => {
              called.push(input);
              return `Sunny in ${input.city}`;
            },
          },
        },
      ],
    },
    { maxChatCompletions: 2 },
  );
  await run.done();
  assert.ok(called.length >= 1);
  for (const input of called) checkWeather("get_weather", input);
  assert.ok(run.messages.some((message) => message.role === "tool" && message.content.startsWith("Sunny in")));
});
