package browsertest

import (
	"flag"
	"fmt"
	"os"
	"testing"
)

var (
	pictureFlag = flag.String("picture", "", "write the README's picture to this `path`; the dark one beside it, as path-dark.png")
	shotsFlag   = flag.String("shots", "", "write screenshots to look at into this `directory`")
)

var tempDir string // of this run

func TestMain(m *testing.M) {
	var err error
	if tempDir, err = os.MkdirTemp("", "whoshere-browsertest"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := os.RemoveAll(tempDir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}
