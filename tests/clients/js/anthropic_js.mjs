// @anthropic-ai/sdk.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { call, checkText, checkWeather, hello, model, url, weatherQuestion, weatherSchema } from "./harness.mjs";

const name = "@anthropic-ai/sdk";
const anthropic = new Anthropic({ baseURL: url, apiKey: "-" });
const short = { model, messages: hello, max_tokens: 40 };

call(name, "messages.create, messages.stream", "text; the final message has the streamed text", async () => {
  checkText((await anthropic.messages.create(short)).content[0].text);
  let text = "";
  const stream = anthropic.messages.stream(short).on("text", (piece) => (text += piece));
  const final = await stream.finalMessage();
  checkText(text);
  assert.equal(final.content[0].text, text);
});
call(name, "tools, tool_choice tool, streamed", "input that fits the schema; stop_reason tool_use", async () => {
  const final = await anthropic.messages
    .stream({
      ...short,
      max_tokens: 100,
      messages: [{ role: "user", content: weatherQuestion }],
      tools: [{ name: "get_weather", description: "The weather of a city", input_schema: weatherSchema }],
      tool_choice: { type: "tool", name: "get_weather" },
    })
    .finalMessage();
  assert.equal(final.stop_reason, "tool_use");
  const used = final.content.find((block) => block.type === "tool_use");
  checkWeather(used.name, used.input);
});
