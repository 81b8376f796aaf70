// A JavaScript client of `python -m serve` that loads the .proto files at run time.
//
//   npm install --omit=dev
//   node client.js "Once upon a time" [--target 127.0.0.1:50051] [--n 2] [--seed 1] [--timeout 60]
//
// The text is printed as it arrives. Ctrl-C cancels on the server. GPT_DIST_TOKEN is sent if set.

import { parseArgs } from "node:util";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTO = fileURLToPath(new URL("../../proto", import.meta.url));

// longs: 64-bit integers such as seeds do not fit into a JavaScript number, so use strings.
const definition = protoLoader.loadSync("gpt_dist/v1/generation_service.proto", {
  includeDirs: [PROTO],
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
  defaults: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).gpt_dist.v1;

// A call that failed with UNAVAILABLE had no effect, so it is safe to repeat.
const SERVICE_CONFIG = JSON.stringify({
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    {
      name: [{ service: "gpt_dist.v1.GenerationService" }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.2s",
        maxBackoff: "2s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
});

/**
 * Streams continuations of a prompt.
 *
 * @param {GenerationService} client
 * @param {object} request a GenerateStreamRequest
 * @param {{timeout?: number, signal?: AbortSignal}} options deadline in seconds; aborting the
 *   signal cancels the call on the server
 * @yields {object} GenerateStreamResponse
 */
export async function* stream(client, request, { timeout = 60, signal } = {}) {
  const metadata = new grpc.Metadata();
  if (process.env.GPT_DIST_TOKEN) {
    metadata.set("authorization", `Bearer ${process.env.GPT_DIST_TOKEN}`);
  }
  const call = client.GenerateStream(request, metadata, {
    deadline: Date.now() + timeout * 1000,
  });
  const cancel = () => call.cancel();
  signal?.addEventListener("abort", cancel);
  if (signal?.aborted) cancel();
  try {
    yield* call;
  } finally {
    signal?.removeEventListener("abort", cancel);
    call.cancel(); // no effect on a finished call
  }
}

export function connect(target) {
  return new GenerationService(target, grpc.credentials.createInsecure(), {
    "grpc.service_config": SERVICE_CONFIG,
  });
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      target: { type: "string", default: "127.0.0.1:50051" },
      n: { type: "string", default: "1" },
      seed: { type: "string" },
      timeout: { type: "string", default: "60" },
      "max-new-tokens": { type: "string", default: "128" },
      json: { type: "boolean", default: false },
    },
  });
  if (positionals.length !== 1) {
    console.error('usage: node client.js "Once upon a time" [--target HOST:PORT] [--n N] …');
    process.exit(2);
  }
  const client = connect(values.target);
  const controller = new AbortController();
  process.once("SIGINT", () => controller.abort());
  const request = {
    prompt: { text: positionals[0] },
    config: {
      sampling: { n: Number(values.n), ...(values.seed && { seed: values.seed }) },
      stopping: { max_new_tokens: Number(values["max-new-tokens"]) },
    },
  };
  let line = null; // the output that the current line belongs to
  try {
    for await (const piece of stream(client, request, {
      timeout: Number(values.timeout),
      signal: controller.signal,
    })) {
      if (values.json) {
        console.log(JSON.stringify(piece));
      } else if (piece.text_delta) {
        if (request.config.sampling.n > 1 && piece.index !== line) {
          process.stdout.write(`${line === null ? "" : "\n"}[${piece.index}] `);
        }
        line = piece.index;
        process.stdout.write(piece.text_delta);
      }
    }
    if (!values.json) process.stdout.write("\n");
  } catch (error) {
    console.error(`error: ${grpc.status[error.code] ?? error.name}: ${error.details ?? error}`);
    process.exitCode = error.code === grpc.status.CANCELLED ? 130 : 1;
  } finally {
    client.close();
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await main();
}
