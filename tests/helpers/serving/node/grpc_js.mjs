// Makes every kind of call through grpc-js; prints one JSON object of what came.
// Arguments: file with a FileDescriptorSet (Retrieval, health, reflection), address of the gRPC port.
import { readFileSync } from "node:fs";
import * as grpc from "@grpc/grpc-js";
import { loadFileDescriptorSetFromBuffer } from "@grpc/proto-loader";

const [descriptors, address] = process.argv.slice(2);
const packages = grpc.loadPackageDefinition(
  loadFileDescriptorSetFromBuffer(readFileSync(descriptors), { longs: Number, defaults: true }),
);
const plain = grpc.credentials.createInsecure();
const make = (service, options = {}) => new service(address, plain, options);
const Retrieval = packages.omnisearchsage.v1.Retrieval;
const client = make(Retrieval);
const question = { query: "red cat", entity_type: "pin", k: 3 };
const soon = () => ({ deadline: Date.now() + 60000 });

function call(of, method, message, { metadata = new grpc.Metadata(), options = soon(), begun } = {}) {
  return new Promise((resolve) => {
    const made = of[method](message, metadata, options, (error, answer) =>
      resolve(error ? { code: grpc.status[error.code], details: error.details } : answer),
    );
    begun?.(made);
  });
}

function streamed(stream, wanted) {
  return new Promise((resolve, reject) => {
    const came = [];
    stream.on("data", (message) => {
      came.push(message);
      if (came.length === wanted) {
        stream.cancel();
        resolve(came);
      }
    });
    stream.on("error", (error) => (came.length === wanted ? null : reject(error)));
  });
}

const ids = (answer) => answer.hits?.map((hit) => hit.id) ?? answer;
const code = (answer) => answer.code ?? "OK";
const found = {};

found.unary = ids(await call(client, "retrieve", question));
const gzip = make(Retrieval, {
  "grpc.default_compression_algorithm": grpc.compressionAlgorithms.gzip,
});
found.gzip = ids(await call(gzip, "retrieve", question));
found.error = await call(client, "retrieve", { ...question, k: 0 });

const slow = {
  queries: Array.from({ length: 500 }, (_, number) => `cat ${number}`),
  target: { entity_type: "pin", k: 300, exact: true },
};
found.deadline = code(
  await call(client, "retrieveBatch", slow, { options: { deadline: Date.now() + 5 } }),
);
found.cancelled = code(
  await call(client, "retrieveBatch", slow, {
    begun: (made) => setTimeout(() => made.cancel(), 5),
  }),
);

const binary = new grpc.Metadata();
binary.set("trace-bin", Buffer.from([0, 255, 10, 13]));
found.binary = ids(await call(client, "retrieve", question, { metadata: binary }));

const large = new grpc.Metadata();
large.set("large", "x".repeat(20000));
const neighbours = [1, 2, 3].map(() => call(client, "retrieve", question));
found.largeMetadata = code(await call(client, "retrieve", question, { metadata: large }));
found.neighbours = (await Promise.all(neighbours)).map(code);
found.afterwards = code(await call(client, "retrieve", question));

const many = { queries: Array(200).fill("red cat"), target: { entity_type: "pin", k: 300 } };
const answers = (await call(client, "retrieveBatch", many)).answers;
found.hits = answers?.reduce((sum, answer) => sum + answer.hits.length, 0);
found.parallel = {};
const parallel = Array.from({ length: 200 }, (_, number) =>
  call(client, "retrieve", { ...question, query: `cat ${number % 9}` }),
);
for (const answer of await Promise.all(parallel)) {
  found.parallel[code(answer)] = (found.parallel[code(answer)] ?? 0) + 1;
}

const watching = make(packages.grpc.health.v1.Health).watch({ service: "" }, soon());
found.watch = (await streamed(watching, 1))[0].status;
const reflecting = make(packages.grpc.reflection.v1alpha.ServerReflection).serverReflectionInfo();
const reflected = streamed(reflecting, 2);
reflecting.write({ list_services: "" });
reflecting.write({ file_containing_symbol: "omnisearchsage.v1.Retrieval" });
const [listed, described] = await reflected;
found.services = listed.list_services_response.service.map((service) => service.name).sort();
found.described = described.file_descriptor_response.file_descriptor_proto.length;

console.log(JSON.stringify(found));
process.exit(0);
