// @langchain/openai.
import assert from "node:assert/strict";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";
import { call, checkCallOrText, checkText, checkWeather, cities, model, openaiUrl, weatherQuestion } from "./harness.mjs";

const name = "@langchain/openai";
const city = z.object({ name: z.string().max(20), country: z.enum(["France", "Italy", "Norway"]) });
const weather = tool(async (input) => `Sunny in ${input.city}`, {
  name: "get_weather",
  description: "The weather of a city",
  schema: z.object({ city: z.enum(cities) }),
});
const chat = (maxTokens) => new ChatOpenAI({ model, apiKey: "-", configuration: { baseURL: openaiUrl }, maxTokens });

call(name, "invoke, stream", "text; the pieces make a text", async () => {
  checkText((await chat(40).invoke("Say hello.")).content);
  let text = "";
  for await (const piece of await chat(40).stream("Say hello.")) text += piece.content;
  checkText(text);
});
call(name, "withStructuredOutput", "the object that zod parsed", async () => {
  city.parse(await chat().withStructuredOutput(city).invoke("Tell me about Paris."));
});
call(name, "bindTools, auto and required; result sent back", "a text or calls; input that fits the schema; a text or calls", async () => {
  const free = await chat(80).bindTools([weather]).invoke(weatherQuestion);
  checkCallOrText(free.content, free.tool_calls.map((each) => [each.name, each.args]));
  const forced = await chat(100).bindTools([weather], { tool_choice: "required" }).invoke(weatherQuestion);
  assert.ok(forced.tool_calls.length);
  for (const each of forced.tool_calls) checkWeather(each.name, each.args);
  const results = await Promise.all(forced.tool_calls.map((each) => weather.invoke(each)));
  const last = await chat(60).bindTools([weather]).invoke([["user", weatherQuestion], forced, ...results]);
  checkCallOrText(last.content, last.tool_calls.map((each) => [each.name, each.args]));
});
