//go:build !race

package sim

// simDefault is the default number of seeds.
const simDefault = 40
