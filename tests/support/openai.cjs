// OpenAI's client for Node against a server: node openai.cjs ADDRESS IMAGE MASK prints what it got as JSON.
const fs = require('node:fs');
const { default: OpenAI, toFile } = require('openai');

const [baseURL, image, mask] = process.argv.slice(2);
const prompt = 'a red apple, 3d';
const quick = { prompt, num_inference_steps: 2, seed: 7 };
const png = (path) => toFile(fs.readFileSync(path), 'it.png', { type: 'image/png' });

/** The class of the error that a call ends with, its status and its field. */
async function refused(call) {
  try {
    await call;
    return null;
  } catch (error) {
    return [error.constructor.name, error.status, error.param];
  }
}

async function main() {
  const client = new OpenAI({ baseURL, apiKey: 'any', maxRetries: 0 });
  const one = await client.images.generate(quick);
  const four = await client.images.generate({ ...quick, n: 4 });
  const edited = await client.images.edit({ ...quick, image: await png(image), mask: await png(mask) });
  const streamed = [];
  // A seed of its own: an image that is there already has no partial images.
  const long = { ...quick, seed: 4712, num_inference_steps: 8 };
  const events = await client.images.generate({ ...long, stream: true, partial_images: 3 });
  for await (const event of events) streamed.push([event.type, event.partial_image_index ?? null]);
  const errors = [
    await refused(client.images.generate({ ...quick, model: 'nothing' })),
    await refused(client.images.generate({ ...quick, n: 11 })),
    await refused(client.images.generate({ ...quick, size: '100x100' })),
    await refused(client.models.retrieve('nothing')),
  ];
  const impatient = new OpenAI({ baseURL, apiKey: 'any', timeout: 500, maxRetries: 30 });
  const late = await impatient.images.generate({ ...quick, num_inference_steps: 25, user: 'impatient' });
  const models = (await client.models.list()).data.map(({ id }) => id);
  const count = ({ data }) => data.filter((found) => found.b64_json).length;
  console.log(JSON.stringify({
    one: count(one), four: count(four), late: count(late), edited: edited.data[0].b64_json, streamed, errors, models,
  }));
}

main();
