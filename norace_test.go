//go:build !race

package mesh

// simDefault is how many seeds of the simulation run by default.
const simDefault = 200
