// Asks a server through connect-node in every protocol and form; prints one JSON object of what came.
// Arguments: file with a FileDescriptorSet, URL of the HTTP port, URL of the gRPC port.
import { readFileSync } from "node:fs";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import {
  createConnectTransport,
  createGrpcTransport,
  createGrpcWebTransport,
} from "@connectrpc/connect-node";

const [descriptors, web, grpc] = process.argv.slice(2);
const registry = createFileRegistry(
  fromBinary(FileDescriptorSetSchema, readFileSync(descriptors)),
);
const service = registry.getService("omnisearchsage.v1.Retrieval");
const http1 = { baseUrl: web, httpVersion: "1.1" };
const http2 = { baseUrl: grpc, httpVersion: "2" };
const transports = {
  "connect json": createConnectTransport({ ...http1, useBinaryFormat: false }),
  "connect proto": createConnectTransport({ ...http1, useBinaryFormat: true }),
  "connect json, gRPC port": createConnectTransport({ ...http2, useBinaryFormat: false }),
  "connect proto, gRPC port": createConnectTransport({ ...http2, useBinaryFormat: true }),
  "grpc-web proto, gRPC port": createGrpcWebTransport({ ...http2, useBinaryFormat: true }),
  "grpc-web proto": createGrpcWebTransport({ ...http1, useBinaryFormat: true }),
  "grpc-web json": createGrpcWebTransport({ ...http1, useBinaryFormat: false }),
  grpc: createGrpcTransport({ baseUrl: grpc }),
};

const found = {};
for (const [name, transport] of Object.entries(transports)) {
  const client = createClient(service, transport);
  const wanted = { query: "red cat", entityType: "pin", k: 3, attributes: ["*"] };
  const answer = await client.retrieve(wanted, { timeoutMs: 60000 });
  const error = await client.retrieve({ ...wanted, k: 0 }, { timeoutMs: 60000 }).then(
    () => "no error",
    (reason) => ConnectError.from(reason),
  );
  const described = await client.describeRelease({});
  found[name] = {
    ids: answer.hits.map((hit) => hit.id),
    scores: answer.hits.map((hit) => hit.score),
    attributes: answer.hits.map((hit) => Object.keys(hit.attributes).length),
    releaseId: answer.releaseId,
    count: Number(described.entities[0].count),
    code: Code[error.code],
    message: error.rawMessage,
  };
}
console.log(JSON.stringify(found));
process.exit(0);
