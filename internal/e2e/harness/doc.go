// Package harness has the code that the tests of whole servers share: a World with a
// Redis and the servers on it, clients of the wire protocol, servers in other
// processes, and checks. docs/testing.md has an example.
//
// The package imports mesh, so tests of package mesh itself cannot use it. Tests of the
// exported API at the root are in package mesh_test.
package harness
