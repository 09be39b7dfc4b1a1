package prose

import (
	"go/ast"
	"go/doc"
	doccomment "go/doc/comment"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// withoutExample are the functions and methods that need none, each with the
// reason.
var withoutExample = map[string]string{
	"CommandError.Error":          "of the interface error",
	"ProgressError.Error":         "of the interface error",
	"ProgressError.Unwrap":        "for errors.Is",
	"Refusal.Error":               "of the interface error",
	"Refusal.Unwrap":              "for errors.Is",
	"Pattern.String":              "for messages",
	"NewHistogram":                "for tests of collectors; used in ExampleHistogram_Quantile",
	"Histogram.Count":             "says what it is; used in ExampleHistogram_Buckets",
	"Histogram.Sum":               "says what it is; used in ExampleHistogram_Quantile",
	"Histogram.MarshalJSON":       "of the interface json.Marshaler",
	"Connection.ID":               "says what it is; used in ExampleConnection_Member",
	"Connection.RemoteAddr":       "says what it is",
	"Server.Presence":             "leads to a manager: its methods have examples",
	"Server.Connections":          "leads to a manager: its methods have examples",
	"Server.Rooms":                "leads to a manager: its methods have examples",
	"PresenceManager.Connections": "leads to a manager: its methods have examples",
	"PresenceManager.Rooms":       "leads to a manager: its methods have examples",
}

// documentation reads a package as pkg.go.dev does.
func documentation(dir, path string) (*doc.Package, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range names {
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return doc.NewFromFiles(fset, files, path)
}

// root is the directory of the repository.
const root = "../.."

const modulePath = "github.com/meshpresence/mesh"

// rootOnce reads many files; the tests below share what it finds.
var rootOnce = sync.OnceValues(func() (*doc.Package, error) { return documentation(root, modulePath) })

func rootDocumentation(t *testing.T) *doc.Package {
	t.Helper()
	p, err := rootOnce()
	require.NoError(t, err)
	return p
}

// verbs calls see for every exported function and method.
func verbs(p *doc.Package, see func(name string, f *doc.Func)) {
	for _, f := range p.Funcs {
		see(f.Name, f)
	}
	for _, typ := range p.Types {
		for _, f := range typ.Funcs { // constructors
			see(f.Name, f)
		}
		for _, f := range typ.Methods {
			see(typ.Name+"."+f.Name, f)
		}
	}
}

// TestEveryMethodHasAnExample checks that each function and method for users has an example
// on pkg.go.dev. Examples run as tests.
func TestEveryMethodHasAnExample(t *testing.T) {
	t.Parallel()
	unused := make(map[string]bool)
	for name := range withoutExample {
		unused[name] = true
	}
	verbs(rootDocumentation(t), func(name string, f *doc.Func) {
		_, needsNone := withoutExample[name]
		delete(unused, name)
		switch {
		case len(f.Examples) == 0 && !needsNone:
			t.Errorf("%s has no Example", name)
		case len(f.Examples) > 0 && needsNone:
			t.Errorf("%s has an Example: it need not be among those without", name)
		}
	})
	assert.Empty(t, unused, "do not exist any more")
}

// TestExamplesAreChecked: an example without output would only be compiled.
func TestExamplesAreChecked(t *testing.T) {
	t.Parallel()
	p := rootDocumentation(t)
	require.NotEmpty(t, p.Examples, "of the package")
	assert.Empty(t, p.Examples[0].Suffix, "the first one is not a recipe")
	assert.NotNil(t, p.Examples[0].Play, "the package's example is to be a whole program")
	check := func(name string, examples []*doc.Example) {
		for _, e := range examples {
			assert.Truef(t, e.Output != "" || e.EmptyOutput, "Example of %s%s without output", name, e.Suffix)
			assert.NotEmptyf(t, e.Doc+e.Output, "Example of %s says nothing", name)
		}
	}
	check("the package", p.Examples)
	for _, typ := range p.Types {
		check(typ.Name, typ.Examples)
	}
	verbs(p, func(name string, f *doc.Func) { check(name, f.Examples) })
}

// TestEverythingIsDocumented checks that every exported name has a comment, and that each
// name in brackets in it is a link.
func TestEverythingIsDocumented(t *testing.T) {
	t.Parallel()
	packages := []*doc.Package{rootDocumentation(t)}
	for _, dir := range []string{"meshtest", "meshdebug", "meshprom"} {
		p, err := documentation(filepath.Join(root, dir), modulePath+"/"+dir)
		require.NoError(t, err)
		packages = append(packages, p)
	}
	for _, p := range packages {
		check := func(name, text string) {
			assert.NotEmptyf(t, text, "%s: %s has no comment", p.Name, name)
			for _, link := range unresolved(p.Parser().Parse(text)) {
				t.Errorf("%s: %s: %s leads nowhere", p.Name, name, link)
			}
		}
		check("package", p.Doc)
		verbs(p, func(name string, f *doc.Func) { check(name, f.Doc) })
		values := append(slices.Clone(p.Consts), p.Vars...)
		for _, typ := range p.Types {
			check(typ.Name, typ.Doc)
			values = append(append(values, typ.Consts...), typ.Vars...)
			eachField(typ.Decl, func(name, text string) {
				for _, link := range unresolved(p.Parser().Parse(text)) {
					t.Errorf("%s: %s.%s: %s leads nowhere", p.Name, typ.Name, name, link)
				}
			})
		}
		for _, v := range values {
			check(v.Names[0], v.Doc)
		}
	}
}

// eachField calls see with the comment of each field of a struct type.
func eachField(decl *ast.GenDecl, see func(name, text string)) {
	ast.Inspect(decl, func(n ast.Node) bool {
		if f, ok := n.(*ast.Field); ok && len(f.Names) > 0 {
			see(f.Names[0].Name, f.Doc.Text()+f.Comment.Text())
		}
		return true
	})
}

var inBrackets = regexp.MustCompile(`\[\*?[A-Za-z]+(\.[A-Za-z]+)*\]`)

// unresolved returns what looks like a link in a comment and is only text.
func unresolved(d *doccomment.Doc) []string {
	var out []string
	texts := func(list []doccomment.Text) {
		for _, x := range list {
			if plain, ok := x.(doccomment.Plain); ok {
				out = append(out, inBrackets.FindAllString(string(plain), -1)...)
			}
		}
	}
	var blocks func([]doccomment.Block)
	blocks = func(list []doccomment.Block) {
		for _, b := range list {
			switch b := b.(type) {
			case *doccomment.Paragraph:
				texts(b.Text)
			case *doccomment.Heading:
				texts(b.Text)
			case *doccomment.List:
				for _, item := range b.Items {
					blocks(item.Content)
				}
			}
		}
	}
	blocks(d.Content)
	return out
}

var goBlock = regexp.MustCompile("(?s)```go\n(.*?)\n```")

// TestDocsQuoteTheRecipes checks that docs/recipes.md has the functions of
// example_recipes_test.go, which run as tests, and no other Go code.
func TestDocsQuoteTheRecipes(t *testing.T) {
	t.Parallel()
	const file = "example_recipes_test.go"
	source, err := os.ReadFile(filepath.Join(root, file))
	require.NoError(t, err)
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, file, source, parser.SkipObjectResolution)
	require.NoError(t, err)
	var recipes []string
	for _, decl := range f.Decls {
		if fn, ok := decl.(*ast.FuncDecl); ok {
			require.Contains(t, fn.Name.Name, "Example_", "only recipes are in the file")
			recipes = append(recipes, string(source[fset.Position(fn.Pos()).Offset:fset.Position(fn.End()).Offset]))
		}
	}
	require.NotEmpty(t, recipes)

	page, err := os.ReadFile(filepath.Join(root, "docs/recipes.md"))
	require.NoError(t, err)
	var quoted []string
	for _, block := range goBlock.FindAllStringSubmatch(string(page), -1) {
		quoted = append(quoted, block[1])
	}
	require.Equal(t, recipes, quoted, "docs/recipes.md quotes the recipes, in their order")
}

var (
	markdownLink = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	codeBlock    = regexp.MustCompile("(?s)```.*?```")
	notInAnchor  = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// docs returns the pages under docs/.
func docs(t *testing.T) []string {
	t.Helper()
	pages, err := fs.Glob(os.DirFS(root), "docs/*.md")
	require.NoError(t, err)
	require.NotEmpty(t, pages)
	return pages
}

// TestDocsLinksLeadSomewhere checks the links of the documents to files and sections
// of this repository.
func TestDocsLinksLeadSomewhere(t *testing.T) {
	t.Parallel()
	pages := append(docs(t), "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md", "meshprom/README.md")
	links := 0
	for _, page := range pages {
		text, err := os.ReadFile(filepath.Join(root, page))
		require.NoError(t, err)
		for _, link := range markdownLink.FindAllStringSubmatch(codeBlock.ReplaceAllString(string(text), ""), -1) {
			target, section, _ := strings.Cut(link[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			links++
			file := page
			if target != "" {
				file = filepath.Join(filepath.Dir(page), target)
			}
			info, err := os.Stat(filepath.Join(root, file))
			if !assert.NoErrorf(t, err, "%s: %s leads nowhere", page, link[1]) || section == "" || info.IsDir() {
				continue
			}
			assert.Containsf(t, anchors(t, file), section, "%s: %s names no section", page, link[1])
		}
	}
	assert.NotZero(t, links)
}

// anchors returns the names of a document's sections in links, as GitHub makes them.
func anchors(t *testing.T, file string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, file))
	require.NoError(t, err)
	var names []string
	for line := range strings.Lines(codeBlock.ReplaceAllString(string(text), "")) {
		if title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
			name := notInAnchor.ReplaceAllString(strings.ToLower(strings.TrimSpace(title)), "")
			names = append(names, strings.ReplaceAll(name, " ", "-"))
		}
	}
	return names
}

// sourceFile finds the names of source files in a document, with or without a path.
var sourceFile = regexp.MustCompile(`[\w./-]*\w\.(?:go|lua)\b`)

// TestDocsNameFilesThatExist finds names of files that have been moved or renamed.
func TestDocsNameFilesThatExist(t *testing.T) {
	t.Parallel()
	paths := make(map[string]bool)
	require.NoError(t, fs.WalkDir(os.DirFS(root), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			// Each end of the path names the file: hub/joined.go, joined.go.
			for rest, more := path, true; more; _, rest, more = strings.Cut(rest, "/") {
				paths[rest] = true
			}
		}
		return err
	}))
	named := 0
	for _, page := range append(docs(t), "CONTRIBUTING.md", "bench/README.md", "meshprom/README.md") {
		text, err := os.ReadFile(filepath.Join(root, page))
		require.NoError(t, err)
		for _, file := range sourceFile.FindAllString(string(text), -1) {
			if strings.HasPrefix(file, "//") { // of an address in the web
				continue
			}
			named++
			assert.Truef(t, paths[strings.TrimLeft(file, "./")], "%s names %s", page, file)
		}
	}
	require.NotZero(t, named)
}
