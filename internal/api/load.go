package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/importer"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// directories returns the directories below root that hold an importable package, "."
// for root itself.
func directories(root string) ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		name := d.Name()
		if path != root && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") ||
			name == "internal" || name == "testdata" || name == "vendor" || name == "examples") {
			return filepath.SkipDir
		}
		public, err := holdsPackage(path)
		if err != nil || !public {
			return err
		}
		rel, err := filepath.Rel(root, path)
		dirs = append(dirs, filepath.ToSlash(rel))
		return err
	})
	return dirs, err
}

// holdsPackage reports whether dir holds a Go file that is not a test. Commands are
// recognised later by their package name.
func holdsPackage(dir string) (bool, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			return true, err
		}
	}
	return false, err
}

// nested reports whether dir belongs to a separate module below root.
func nested(root, dir string) bool {
	for dir != "." {
		if _, err := os.Stat(filepath.Join(root, dir, "go.mod")); err == nil {
			return true
		}
		dir = filepath.ToSlash(filepath.Dir(dir))
	}
	return false
}

// load returns the package in dir with its types, from the export data in the build
// cache. Reading the source of all imports would take seconds.
func load(dir string) (*types.Package, error) {
	cmd := exec.Command("go", "list", "-export", "-deps", "-json=ImportPath,Export", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		first := strings.SplitAfterN(stderr.String(), "\n", 6) // the first lines; the compiler prints a line per package
		return nil, fmt.Errorf("go list in %s: %w\n%s", dir, err, strings.Join(first[:min(5, len(first))], ""))
	}
	exports := map[string]string{}
	last := "" // with -deps the package itself comes last
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct{ ImportPath, Export string }
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("go list in %s: %w", dir, err)
		}
		exports[p.ImportPath], last = p.Export, p.ImportPath
	}
	open := func(path string) (io.ReadCloser, error) {
		if exports[path] == "" {
			return nil, fmt.Errorf("%s: no export data", path)
		}
		return os.Open(exports[path])
	}
	return importer.ForCompiler(token.NewFileSet(), "gc", open).Import(last)
}
