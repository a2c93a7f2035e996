{
  "schema_version": 1,
  "kind": "signature",
  "algorithm": "ed25519",
  "key": "b4bbd077ef3970c36dc3fbbdfe5ad3c9cf28cbc039707f0ba6755da11f098392",
  "signature": "SE6Aonzk5BTDSuDIB0MEHGSKLX896UsgRK/g8E1og5WtlEHZBMZ9jS/iMil+bDZcpfr5rg69dcQMmdq/dpUqCA=="
}
