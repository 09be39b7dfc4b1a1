//go:build race

package mesh

// simDefault is how many seeds of the simulation run by default: with the race
// detector each takes ten times as long, and is the same.
const simDefault = 60
