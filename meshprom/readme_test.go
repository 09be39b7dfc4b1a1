package meshprom

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

const (
	tableBegin = "<!-- table: go test -update -->\n"
	tableEnd   = "<!-- end of the table -->\n"
)

// readmeTable returns the table of metrics for README.md.
func readmeTable() string {
	var b strings.Builder
	b.WriteString("| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, m := range table() {
		label := ""
		if m.label != "" {
			label = fmt.Sprintf("`%s`: %s", m.label, strings.Join(m.values, ", "))
		}
		fmt.Fprintf(&b, "| `%s_%s` | %s | %s | %s |\n", DefaultNamespace, m.name, m.kind, label, m.help)
	}
	return b.String()
}

func TestReadmeTable(t *testing.T) {
	data, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	before, rest, ok := strings.Cut(text, tableBegin)
	has, after, ended := strings.Cut(rest, tableEnd)
	if !ok || !ended {
		t.Fatal("README.md has no marks around its table")
	}
	if want := readmeTable(); has != want {
		if !*update {
			t.Fatalf("the table of README.md differs (go test -update writes it):\n%s", want)
		}
		if err := os.WriteFile("README.md", []byte(before+tableBegin+want+tableEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// The alerts use only metrics and label values that exist, and use histograms correctly.
func TestReadmeNames(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	series := make(map[string]metric)
	for _, m := range table() {
		if m.kind != histogram {
			series["mesh_"+m.name] = m
			continue
		}
		for _, part := range []string{"_bucket", "_sum", "_count"} {
			series["mesh_"+m.name+part] = m
		}
	}
	_, after, _ := strings.Cut(string(data), tableEnd)
	found := 0
	for _, use := range regexp.MustCompile(`(mesh_[a-z_]+)(\{[^}]*\})?`).FindAllStringSubmatch(after, -1) {
		m, ok := series[use[1]]
		if !ok {
			t.Errorf("there is no series %s", use[1])
			continue
		}
		found++
		for _, match := range regexp.MustCompile(`([a-z_]+)(=~?|!=|!~)"([^"]*)"`).FindAllStringSubmatch(use[2], -1) {
			if match[1] == "le" {
				continue
			}
			if match[1] != m.label {
				t.Errorf("%s has no label %s", use[1], match[1])
				continue
			}
			for _, value := range strings.Split(match[3], "|") {
				if !strings.Contains(" "+strings.Join(m.values, " ")+" ", " "+value+" ") {
					t.Errorf("%s of %s is never %s", match[1], use[1], value)
				}
			}
		}
	}
	if found < 5 {
		t.Errorf("only %d uses of metrics after the table", found)
	}
}
