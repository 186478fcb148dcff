"""The durable log of live upserts and deletes: records, files, writer, reader, maintenance."""
