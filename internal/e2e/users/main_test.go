package users

import (
	"testing"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
