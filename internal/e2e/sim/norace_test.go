//go:build !race

package sim

// simDefault is how many seeds of the simulation run by default.
const simDefault = 40
