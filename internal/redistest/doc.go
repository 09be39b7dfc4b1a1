// Package redistest starts real Redis servers for tests, stops, kills and pauses them,
// and puts a faulty network in front of them. Import it only in tests.
//
// The binary is redis-server of the PATH, or the one that the environment variable
// MESH_REDIS_SERVER names, by path or name, for example "valkey-server". Without a
// binary, tests are skipped. With MESH_REQUIRE_REDIS=1 they fail instead. With -short
// they are always skipped.
//
// No port is fixed, so any number of tests and test binaries may run at the same time.
package redistest
