package api

import (
	"flag"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var (
	update     = flag.Bool("update", false, "write the listings instead of comparing")
	needNested = flag.Bool("nested", false, "fail, not skip, where a nested module cannot be loaded")
)

const root = "../.."

func TestListings(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("left out by -short: type-checks every package and what it imports")
	}
	dirs, err := directories(root)
	require.NoError(t, err)
	require.Contains(t, dirs, ".")
	require.Contains(t, dirs, "meshtest")

	known := map[string]bool{}
	for _, dir := range dirs {
		file := filepath.Join(root, "api", fileName(dir))
		known[file] = true
		t.Run(dir, func(t *testing.T) {
			t.Parallel()
			pkg, err := load(filepath.Join(root, dir))
			if err != nil && nested(root, dir) && !*needNested {
				t.Skip("a module of its own, whose dependencies are not here: ", err)
			}
			require.NoError(t, err)
			if pkg.Name() == "main" {
				return
			}
			compare(t, file, strings.Join(list(pkg), "\n")+"\n")
		})
	}
	listings, err := filepath.Glob(filepath.Join(root, "api", "*.txt"))
	require.NoError(t, err)
	for _, file := range listings {
		if known[file] {
			continue
		}
		if *update {
			require.NoError(t, os.Remove(file))
			continue
		}
		t.Errorf("%s is of a package that is gone: run go test ./internal/api -update, and add a line to CHANGELOG.md", file)
	}
}

func compare(t *testing.T, file, now string) {
	if *update {
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(now), 0o644))
		return
	}
	was, err := os.ReadFile(file)
	if err == nil && string(was) == now {
		return
	}
	t.Errorf("the exported API is not what %s says: run go test ./internal/api -update, and add a line to CHANGELOG.md%s%s",
		file, missing("\n- ", string(was), now), missing("\n+ ", now, string(was)))
}

// missing returns the lines of a that are not in b, each after mark.
func missing(mark, a, b string) string {
	in := map[string]bool{}
	for line := range strings.Lines(b) {
		in[line] = true
	}
	var out strings.Builder
	for line := range strings.Lines(a) {
		if !in[line] {
			out.WriteString(mark + strings.TrimSpace(line))
		}
	}
	return out.String()
}

// fileName returns the name of the listing for the package in dir: mesh.txt,
// meshtest.txt, or a-b.txt for a package b in a.
func fileName(dir string) string {
	if dir = path.Clean(dir); dir == "." {
		return "mesh.txt"
	}
	return strings.ReplaceAll(dir, "/", "-") + ".txt"
}
