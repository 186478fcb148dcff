// Asks a server from a page of another origin through connect-web; leaves what came in window.found.
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { base64Decode } from "@bufbuild/protobuf/wire";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { createClient } from "@connectrpc/connect";
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";

const given = new URLSearchParams(location.search);
const content = base64Decode(given.get("descriptors"));
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, content));
const service = registry.getService("omnisearchsage.v1.Retrieval");
const transports = { connect: createConnectTransport, grpcWeb: createGrpcWebTransport };

const found = {};
for (const [name, create] of Object.entries(transports)) {
  const client = createClient(service, create({ baseUrl: given.get("server") }));
  try {
    const answer = await client.retrieve({ query: "red cat", entityType: "pin", k: 3 });
    found[name] = answer.hits.map((hit) => hit.id);
  } catch (error) {
    found[name] = String(error);
  }
}
window.found = found;
