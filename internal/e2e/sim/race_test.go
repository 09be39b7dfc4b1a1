//go:build race

package sim

// simDefault is how many seeds of the simulation run by default. With the race
// detector each takes ten times as long.
const simDefault = 20
