package main

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The README shows the program unchanged, and the program stays short.
func TestREADMEShowsThisProgram(t *testing.T) {
	t.Parallel()
	program, err := os.ReadFile("main.go")
	require.NoError(t, err)
	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	require.LessOrEqual(t, strings.Count(string(program), "\n"), 50)
	_, code, found := strings.Cut(string(program), "package main")
	require.True(t, found)
	require.Contains(t, string(readme), "```go\npackage main"+code+"```")
}
