# What scripts begin with that read images from DATA.

# begin USAGE ARGUMENTS...: sets data to the whole path of the only argument, and goes to the top of the repository. It ends the
# script with USAGE where there are more arguments, or none.
begin() {
    if [ $# -ne 2 ]; then
        echo "usage: $1" >&2
        exit 2
    fi
    data=$(realpath "$2")
    cd "$(dirname "$0")/.."
}

# whole_numbers NAME...: ends the script, before any work, if one of these variables is set to anything but a whole number from 1.
whole_numbers() {
    local name
    for name in "$@"; do
        if [[ -n ${!name:-} && ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
            echo "$name=${!name} is not a whole number from 1" >&2
            exit 2
        fi
    done
}

# known_words NAME WHAT KNOWN...: ends the script if this variable has a word that is none of the KNOWN, which are WHAT.
known_words() {
    local word
    for word in ${!1:-}; do
        if [[ " ${*:3} " != *" $word "* ]]; then
            echo "$1=$word is none of $2: ${*:3}" >&2
            exit 2
        fi
    done
}

# claim FOLDER DATA [SETTINGS]: makes the folder of a script's runs, or ends the script if DATA does not exist, or if the folder
# holds runs on other data or with other settings, which would be mistaken for finished ones.
claim() {
    local known=$1/data.txt of=$2${3:-}
    if [ ! -e "$2" ]; then
        echo "$2: no such file or folder" >&2
        exit 2
    fi
    mkdir -p "$1"
    if [ -f "$known" ] && [ "$(cat "$known")" != "$of" ]; then
        echo "$1 holds runs on $(cat "$known"), not on $of: move it away, or delete $known if the images are the same" >&2
        exit 2
    fi
    echo "$of" > "$known"
}
